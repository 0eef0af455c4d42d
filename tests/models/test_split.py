"""Rows held back for validation: each class in its proportion, as scikit-learn's StratifiedShuffleSplit draws them."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit

import restrain as rs
from restrain.errors import PlanError, RestrainWarning
from restrain.models.data import Samples, held_back, shuffled, split

RNG = np.random.default_rng(0)


def counts(labels, rows):
    return np.bincount(labels[rows], minlength=labels.max() + 1)


def drawn(labels, count, seed=0):
    order = np.random.default_rng(seed).permutation(len(labels))
    train, valid = held_back(order, count, labels)
    assert np.array_equal(np.sort(np.concatenate([train, valid])), np.arange(len(labels)))
    assert np.array_equal(train, np.sort(train))
    assert np.array_equal(valid, np.sort(valid))
    assert len(valid) == count
    return train, valid


def test_classes_are_held_back_as_by_scikit_learn():
    """But for what scikit-learn draws between (equal remainders), and for classes that it leaves no row to train on."""
    compared = 0
    for seed in range(60):
        draw = np.random.default_rng(seed)
        sizes = draw.choice(np.arange(5, 200), draw.integers(2, 7), replace=False)
        labels = draw.permutation(np.repeat(np.arange(len(sizes)), sizes))
        count = int(draw.integers(len(sizes), len(labels) - len(sizes)))
        train, reference = next(StratifiedShuffleSplit(1, test_size=count, random_state=seed).split(labels, labels))
        if len(set((sizes * count / len(labels) % 1).round(12))) == len(sizes) == len(np.unique(labels[train])):
            assert counts(labels, drawn(labels, count, seed)[1]).tolist() == counts(labels, reference).tolist()
            compared += 1
    assert compared > 40


@pytest.mark.parametrize("seed", range(20))
def test_equal_remainders_are_drawn_between(seed):
    labels = np.repeat(np.arange(5), 3)
    found = counts(labels, drawn(labels, 7, seed)[1])
    assert sorted(found.tolist()) == [1, 1, 1, 2, 2]


def test_rows_of_a_class_are_equally_likely():
    """Each of 30 rows is held back in a third of 900 draws: within 5 deviations."""
    labels, total = np.repeat([0, 1, 1, 2, 2, 2], 5), np.zeros(30)
    for seed in range(900):
        total[drawn(labels, 10, seed)[1]] += 1
    wanted = np.array([np.mean([counts(labels, drawn(labels, 10, s)[1])[k] / n for s in range(900)])
                       for k, n in enumerate([5, 10, 15])])  # fmt: skip
    assert (np.abs(total - 900 * wanted[labels]) < 5 * np.sqrt(900 * wanted * (1 - wanted))[labels]).all()


def test_the_minority_is_judged_whatever_the_seed():
    labels = np.repeat([0, 1], [190, 10])
    x = RNG.normal(size=(200, 2)) + 3 * labels[:, None]
    for seed in range(5):
        model = rs.Classifier(hidden=(), epochs=1, random_state=seed)
        samples = Samples(x, labels, labels=True)
        train, valid = split(samples, 0.2, model.fit(x, labels, valid=0.2).seed_)
        assert counts(labels, valid.rows).tolist() == [38, 2]
        assert counts(labels, train.rows).tolist() == [152, 8]


def test_without_classes_rows_are_drawn_as_ever():
    samples = split(Samples(np.zeros((50, 1)), np.zeros(50)), 0.3, seed=7)
    order = shuffled(50, 7, 1)
    assert samples[1].rows.tolist() == sorted(order[:15].tolist())
    assert samples[0].rows.tolist() == sorted(order[15:].tolist())


def test_labels_of_steps_have_no_class_a_row():
    x, y = RNG.normal(size=(20, 5, 3)), RNG.integers(0, 2, (20, 5))
    model = rs.Classifier(hidden=((4, "rnn"),), epochs=1, valid=0.25).fit(x, y)
    assert "valid_acc" in model.history_[0]


def test_a_class_of_one_row_is_trained_on_and_told():
    labels = np.array(["often"] * 99 + ["once"])
    x = RNG.normal(size=(100, 2))
    for seed in range(10):
        with pytest.warns(RestrainWarning, match="no row is held back of 'once'"):
            model = rs.Classifier(hidden=(), epochs=1, random_state=seed).fit(x, labels, valid=0.5)
        assert set(model.classes_) == {"often", "once"}
    with pytest.raises(ValueError, match="only 1 member"):
        next(StratifiedShuffleSplit(1, test_size=0.5).split(x, labels))


@pytest.mark.parametrize(("sizes", "count"), [([1, 1, 1], 1), ([2, 2, 2], 4), ([1, 99], 99)])
def test_more_than_all_but_a_row_of_each_class_is_refused(sizes, count):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    with pytest.raises(PlanError, match="fewer to train on than there are classes"):
        drawn(labels, count)
    with pytest.raises(ValueError, match=r"class|least"):
        next(StratifiedShuffleSplit(1, test_size=count).split(labels, labels))


# One class


@pytest.mark.parametrize("labels", [["a"] * 20, [1] * 20, [True] * 20, [0, 1] * 10])
def test_one_class_is_refused_as_scikit_learn_does(labels):
    x, weight = RNG.normal(size=(20, 2)), [0, 1] * 10
    if len(set(labels)) == 1:
        with pytest.raises(ValueError, match="one class"):
            LogisticRegression().fit(x, labels)
    with pytest.raises(PlanError, match=r"at least two classes apart, got one class only: \["):
        rs.Classifier().fit(x, labels, weight)
    with pytest.raises(PlanError, match="one class only"):
        rs.Classifier().train((x, labels, weight))


def test_one_class_of_several_that_there_will_be():
    x = RNG.normal(size=(20, 2))
    rs.Classifier(hidden=()).partial_fit(x, [1] * 20, classes=[0, 1])
    with pytest.raises(PlanError, match="one class only"):
        rs.Classifier(hidden=()).partial_fit(x, [1] * 20, classes=[1])
    with pytest.warns(RestrainWarning, match="all 20 labels are of one class, 1: any network learns to say that"):
        model = rs.Classifier([2, 3], epochs=1).fit(x, [1] * 20)
    model.train((x, [2] * 20), epochs=1)
    with pytest.raises(PlanError, match="one class only"):
        rs.Classifier([2, 1], epochs=1).fit(x, [0] * 20)
