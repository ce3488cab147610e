"""Harmless prompts that sound dangerous, and harmless requests for the wrappers, with answers."""

from sst_lightning.data.embedded import a7_everyday, a7_lookalikes

HELD_OUT_SUBJECTS = ("blow", "bury", "drown", "hijack", "murder", "shoot", "weapon", "whip")
"""Look-alike subjects that only the test split has."""


def parse(text: str) -> dict[str, tuple[tuple[str, str], ...]]:
    """Return (question, answer) pairs by subject.

    Args:
        text: ``# subject`` lines, ``? question`` lines, and answers below their question.
    """
    subjects: dict[str, list[tuple[str, str]]] = {}
    subject, question, answer = "", "", list[str]()

    def close() -> None:
        if question:
            subjects.setdefault(subject, []).append((question, " ".join(answer)))

    for line in text.splitlines():
        mark, rest = line[:2], line[2:].strip()
        if mark == "# ":
            close()
            subject, question, answer = rest, "", []
        elif mark == "? ":
            close()
            question, answer = rest, []
        elif line.strip():
            answer.append(line.strip())
    close()
    return {name: tuple(pairs) for name, pairs in subjects.items()}


LOOKALIKES = parse(a7_lookalikes.TEXT)
"""Questions with answers, by the word that sounds dangerous."""

REQUESTS = parse(a7_everyday.TEXT)[""]
"""Everyday requests, each after "how to", with answers."""
