"""What every refusal to trace a predicate has to say."""

import inspect

import pytest

from maskflash.errors import MaskflashError, MaskTraceError
from maskflash.trace.trace import trace


def refuse(predicate, *words, code=None, **mask_args):
    """Check the message of tracing a predicate: its file and line, the code and key words of the problem and fix."""
    here = inspect.getsourcefile(predicate)
    with pytest.raises(MaskTraceError) as caught:
        trace(predicate, mask_args)
    message = str(caught.value)
    lines, first = inspect.getsourcelines(predicate)
    span = range(first, first + len(lines))
    assert any(f"{predicate.__name__} ({here}:{line}): " in message for line in span), message
    for word in words:
        assert word in message, message
    if code is not None:
        assert f': "{code}" ' in message, message
        (line,) = [line for line in span if f"({here}:{line})" in message]
        assert code in lines[line - first], message
    assert message.endswith((".", "?")), message
    assert isinstance(caught.value, (MaskflashError, TypeError))
    return message
