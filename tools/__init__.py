"""Floor 7: the command line and all that is run by hand.  Each command of `continuo` is its own module."""
