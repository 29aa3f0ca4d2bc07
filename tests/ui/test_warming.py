"""What is made beside the server before anybody asks for it."""

from keel.core.errors import ConfigError
from keel.papers.search import latent_space
from keel.ui.recipe_view import entries
from keel.ui.warming import begin_warming


def test_what_pages_keep_is_made():
    entries.cache_clear()
    begin_warming().join(120)
    assert entries.cache_info().currsize == 1 and latent_space.cache_info().currsize == 1


def test_what_cannot_be_made_is_left_to_the_pages(monkeypatch):
    def lacking():
        raise ConfigError("needs scikit-learn")

    monkeypatch.setattr("keel.papers.search.latent_space", lacking)
    wrong = []
    monkeypatch.setattr("threading.excepthook", wrong.append)
    begin_warming().join(120)
    assert wrong == []
