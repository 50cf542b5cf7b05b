"""Errors as values."""

from rednet.service.errors import DecoderUnavailable, Overloaded, UnreadableImage


def test_error_with_another_message_is_a_copy() -> None:
    """Several responses may share an error: each adds its prefix to a copy."""
    for error in (UnreadableImage("damaged"), Overloaded("full", 3.0), DecoderUnavailable()):
        before = error.message
        copy = error.with_message(f"image 1: {before}")
        assert (type(copy), copy.message, str(copy)) == (type(error), f"image 1: {before}", f"image 1: {before}")
        assert (error.message, str(error)) == (before, before)
    assert Overloaded("full", 3.0).with_message("x").retry_after_s == 3.0
