"""The tests, as a package: a helper is imported as `tests.NAME`, whatever else bears that name."""
