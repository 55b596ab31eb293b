"""Fixtures of the tests of remote shards."""

import pytest

from depth_anything.data import remote, retry


@pytest.fixture
def clean_remote_state(tmp_path, monkeypatch):
    """No proxy, an empty cache, a long timeout for busy machines, and no state of other tests."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DEPTH_ANYTHING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DEPTH_ANYTHING_RETRIES", "2")
    monkeypatch.setenv("DEPTH_ANYTHING_TIMEOUT", "60")
    for state in (remote._pools, remote._without_ranges, retry._reported, remote._announced):
        state.clear()
    for cached in (remote._netrc_hosts, remote._proxy_url):
        cached.cache_clear()
