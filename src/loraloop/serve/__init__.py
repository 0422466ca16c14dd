"""Serving: a router that records every call, servers behind it, and switching from one adapter to the next without a dropped request."""
