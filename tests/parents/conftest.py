"""The same small families that merging has."""

from tests.merging.conftest import _one_thread_and_own_cache, family_of, own_family

__all__ = ["_one_thread_and_own_cache", "family_of", "own_family"]
