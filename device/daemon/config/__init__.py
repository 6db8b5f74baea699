"""The daemon's settings, the file that explains them, and the checks of `edgeear doctor`."""
