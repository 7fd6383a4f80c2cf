import pytest

from tests.demo import corpus


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A folder of Python source; to be read alone."""
    return corpus.make(tmp_path_factory.mktemp("source"))
