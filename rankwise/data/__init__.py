"""From files to tokens: rows of any shape, conversations, and the mask of the tokens that are trained."""
