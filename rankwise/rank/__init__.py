"""Which rank a task needs: four instruments and the statistics behind them."""
