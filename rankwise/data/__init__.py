"""From files to tokens: rows, conversations, and the mask of the tokens that are trained."""
