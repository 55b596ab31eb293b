"""One module for each published dataset."""
