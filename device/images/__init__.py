"""Pictures and other files as arrays: data sets, decoding, views, features."""
