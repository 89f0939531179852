"""`kinema data`: data sets looked at from the command line."""
