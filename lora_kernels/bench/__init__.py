"""The instrument: how results are judged and times are taken, for tests, `verify` and `bench`."""
