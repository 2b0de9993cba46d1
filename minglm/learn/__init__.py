"""Learning by doing: models with real bugs to be found."""
