"""An environment of the API before 0.2."""


def load_environment():
    return None
