import pytest

from vivace import library


@pytest.fixture(scope="session")
def operator_library():
    return library.find()
