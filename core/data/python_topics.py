"""A corpus that every Python carries: the language reference that help() shows.

`pydoc_data.topics` is part of CPython's standard library (PSF licence), so training can be tried without a
download: about 80 documents and 460 kB of English prose with code. The text belongs to the Python version that runs;
a model trained on it should record the sha256 of what it saw, as the token shards do.
"""

from portlm.errors import FormatError


def python_topics() -> str:
    """Return the topics of Python's help() as one text, in the order of their names.

    Each document is its name as a heading, a blank line, and its text; a blank line ends it.

    Raises:
        FormatError: this Python was installed without its help topics.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FormatError(
            "this Python has no pydoc_data.topics, the text of its help(): give a text file instead"
        ) from None
    return "".join(f"# {name}\n\n{topics[name].strip()}\n\n" for name in sorted(topics))
