"""In which order a sweep's axes are handed to Hydra."""

from collections.abc import Collection


def trainings_first(
    words: list[str], jobs: list[list[str]], trainings: list[str], groups: Collection[str]
) -> list[str]:
    """A sweep's words with the axes that change the evaluation alone before all others. Hydra varies the first axis
    slowest, so that a sweep then begins with one run of every training, and no worker waits for another's."""

    def key_of(word: str) -> str:
        return word.split("=", 1)[0].lstrip("+")

    def is_apart(key: str) -> bool:
        """Whether its place among the words means nothing: no other sets the same field."""
        others = {key_of(word) for word in words} - {key, *groups}
        nested = any(f"{key}.".startswith(f"{other}.") or other.startswith(f"{key}.") for other in others)
        return key in groups or (not nested and [*map(key_of, words)].count(key) == 1)

    evaluation = set[str]()
    for axis, word in enumerate(jobs[0]):
        found: dict[tuple[str, ...], set[str]] = {}
        for job, training in zip(jobs, trainings, strict=True):
            found.setdefault((*job[:axis], *job[axis + 1 :]), set()).add(training)
        is_swept = len({job[axis] for job in jobs}) > 1
        if is_swept and is_apart(key_of(word)) and all(len(each) == 1 for each in found.values()):
            evaluation.add(key_of(word))
    return sorted(words, key=lambda word: key_of(word) not in evaluation)
