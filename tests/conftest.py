import pytest

from tests.support import WordProcessor


@pytest.fixture
def word_processor():
    return WordProcessor()


@pytest.fixture
def no_bars():
    import datasets

    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
