"""What the process keeps between steps."""

import os

from rankwise.engine.heap import keep_few_programs

NAME = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def test_onednn_keeps_fewer_programs_than_by_default(monkeypatch):
    monkeypatch.delenv(NAME, raising=False)
    keep_few_programs()
    assert 0 < int(os.environ[NAME]) < 1024


def test_a_number_that_the_user_chose_stays(monkeypatch):
    monkeypatch.setenv(NAME, "7")
    keep_few_programs()
    assert os.environ[NAME] == "7"
