from lm.corpus import Corpus, Record
from lm.overlap import in_train

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen"


def corpus(validation: list[tuple[str, str]]) -> Corpus:
    def records(pairs: list[tuple[str, str]]) -> list[Record]:
        return [Record(q, f"{q} {a}", a) for q, a in pairs]

    train = records([("what?", "The Otter swims."), ("count!", f"{LONG} fourteen")])
    return Corpus("made", "here", {"train": train, "validation": records(validation), "test": []}, "digest")


def test_an_answer_of_train_is_found_whatever_its_case() -> None:
    copied, shared = in_train(corpus([("why?", "the otter swims."), ("why?", "the otter sleeps.")]))["validation"]
    assert copied.tolist() == [True, False]
    assert shared.tolist() == [False, False]


def test_thirteen_words_in_a_row_are_found_and_twelve_are_not() -> None:
    twelve = LONG.removesuffix(" thirteen")
    pairs = [("a", f"so {LONG.upper()} and on"), ("b", f"so {twelve} and on"), ("c", "")]
    copied, shared = in_train(corpus(pairs))["validation"]
    assert copied.tolist() == [False, False, False]
    assert shared.tolist() == [True, False, False]


def test_words_of_other_scripts_are_whole_words_and_punctuation_is_none() -> None:
    greek = "ένα δύο τρία τέσσερα πέντε έξι επτά οκτώ εννέα δέκα έντεκα δώδεκα"
    made = corpus([("a", f"{greek} δεκατρία"), ("b", greek), ("c", LONG.replace(" ", ", "))])
    made.splits["train"].append(Record("μέτρα", f"μέτρα: {greek}, δεκατρία!", "δεκατρία"))
    _, shared = in_train(made)["validation"]
    assert shared.tolist() == [True, False, True]


def test_a_run_does_not_reach_over_the_end_of_a_record() -> None:
    _, shared = in_train(corpus([("x", f"y {LONG[:40]}"), ("z", LONG[40:])]))["validation"]
    assert not shared.any()


def test_an_empty_split_has_no_records_to_mark() -> None:
    copied, shared = in_train(corpus([]))["test"]
    assert (len(copied), len(shared)) == (0, 0)
