"""What tests assert alike, in one line."""

import pytest


def refuses(error, message, call, /, *args, **options):
    """A call raises an error of this class whose text matches the message."""
    with pytest.raises(error, match=message):
        call(*args, **options)
