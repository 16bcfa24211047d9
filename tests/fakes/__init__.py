"""Hosts on this machine's loopback, for tests with real clients."""
