"""Statistics, contact sheets and checks of data sets."""
