"""Market-1501's layout and its scores."""

import numpy as np
import pytest

from dpal_edge.errors import DataError
from dpal_edge.tasks.reid import Identity, read_market, retrieval_metrics
from tests.tasks.layouts import write_market


@pytest.fixture
def market(tmp_path):
    return write_market(tmp_path / "market")


def test_reader_drops_junk_and_keeps_distractors(market):
    gallery = read_market(market, "gallery").samples
    assert [sample.target for sample in gallery] == [Identity(0, 3), *(Identity(i, 2) for i in range(1, 7))]
    assert [sample.target for sample in read_market(market, "query").samples] == [Identity(i, 1) for i in range(1, 7)]
    assert len(read_market(market, "train").samples) == 6


def test_reader_needs_no_other_split(market):
    for path in (market / "bounding_box_train").iterdir():
        path.unlink()
    (market / "bounding_box_train").rmdir()
    assert len(read_market(market, "query").samples) == 6
    with pytest.raises(DataError, match=r"bounding_box_train: missing; expected the Market-1501 layout"):
        read_market(market, "train")


def test_reader_leaves_out_bad_names_and_stops_at_many(tmp_path):
    query = write_market(tmp_path, people=40) / "query"
    (query / "holiday.jpg").write_bytes(b"")
    (query / "._0001_c1s1_000001_00.png").write_bytes(b"")
    split = read_market(tmp_path, "query")
    assert len(split.samples) == 40
    [problem] = split.problems
    assert problem.startswith(f"{query}: holiday.jpg: its name tells no person and camera; expected the Market-1501")
    (query / "0001_x.jpg").write_bytes(b"")
    (query / "-2_c1.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"-2_c1\.jpg: its name tells .* \(and 2 more of 43\); more than 5 % are bad"):
        read_market(tmp_path, "query")


def test_reader_needs_people(market):
    (market / "empty" / "query").mkdir(parents=True)
    with pytest.raises(DataError, match="query: no images of people"):
        read_market(market / "empty", "query")


def test_reader_tells_of_images_in_folders(tmp_path):
    query = write_market(tmp_path, people=40) / "query"
    (query / ".thumbnails").mkdir()
    (query / "notes").mkdir()
    (query / "notes" / "a.txt").touch()
    (query / "more").mkdir()
    (query / "more" / "0001_c1s1_000001_00.png").touch()
    split = read_market(tmp_path, "query")
    assert len(split.samples) == 40
    assert split.problems == (f"{query}: more: a folder, whose images are not read; move them into the one above",)


def _angles(*degrees):
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1).astype(np.float32)


def test_scores_by_hand():
    # Ranked by angle to the query at 0 degrees: own camera (left out), miss, hit, miss, hit.
    gallery = [Identity(1, 1), Identity(2, 2), Identity(1, 2), Identity(0, 2), Identity(1, 3)]
    scores = retrieval_metrics(_angles(0), _angles(1, 10, 20, 30, 40), [Identity(1, 1)], gallery)
    assert scores == {"mAP": pytest.approx((1 / 2 + 2 / 4) / 2), "rank-1": 0.0, "rank-5": 1.0}


def test_queries_without_a_match_do_not_count():
    query, gallery = [Identity(1, 1), Identity(7, 1)], [Identity(2, 2), Identity(1, 2), Identity(7, 1)]
    scores = retrieval_metrics(_angles(0, 90), _angles(90, 0, 90), query, gallery)
    assert scores == {"mAP": 1.0, "rank-1": 1.0, "rank-5": 1.0}
    with pytest.raises(DataError, match="none of 1 query images has its person in the gallery"):
        retrieval_metrics(_angles(90), _angles(90, 0, 90), query[1:], gallery)


def test_scores_do_not_depend_on_lengths_or_order_and_agree_with_a_second_implementation():
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(0)
    people, cameras = rng.integers(0, 20, 400), rng.integers(0, 3, 400)
    features = rng.normal(size=(400, 8)).astype(np.float32) + np.eye(20, 8, dtype=np.float32)[people]
    identities = [Identity(int(p), int(c)) for p, c in zip(people, cameras, strict=True)]
    # More queries than are compared at a time.
    query, gallery = slice(300), slice(100, 400)
    scores = retrieval_metrics(features[query], features[gallery], identities[query], identities[gallery])
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected, ahead = [], []
    for i in range(300):
        kept = [j for j in range(100, 400) if not (people[i] == people[j] and cameras[i] == cameras[j])]
        near, same = unit[kept] @ unit[i], people[kept] == people[i]
        expected.append(average_precision_score(same, near))
        ahead.append((near[~same] > near[same].max()).sum())
    assert scores["mAP"] == pytest.approx(np.mean(expected), abs=1e-6)
    for k in (1, 5):  # the best match is among the first k where fewer than k others are nearer
        assert scores[f"rank-{k}"] == np.mean(np.array(ahead) < k)

    order = rng.permutation(300)
    longer = features[gallery][order] * rng.uniform(0.1, 9, (300, 1)).astype(np.float32)
    again = retrieval_metrics(features[query], longer, identities[query], [identities[gallery][i] for i in order])
    assert again == pytest.approx(scores)


def test_reader_on_real_data(shared):
    folder = shared / "data" / "cuhk01"
    counts = {split: len(read_market(folder, split).samples) for split in ("train", "query", "gallery")}
    assert counts == {"train": 1296, "query": 648, "gallery": 648}
    assert len({sample.target.person for sample in read_market(folder, "query").samples}) == 324
