"""Hand-picked events of a small KuaiRand log: midnight in Beijing, ties, features, leaks."""

from __future__ import annotations

import csv
import datetime
import statistics

import log_oracle
import numpy as np
import pytest

from stca_jax.data.preparation import prepare
from stca_jax.input.dataset import RequestDataset

LOG_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,"
    "long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,"
    "is_rand,tab"
)
VIDEOS = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,"
    "server_width,server_height,music_id,music_type,tag",
    '0,123,NORMAL,2022-04-07,LongImport,1.0,87433.0,720.0,1280.0,9155697141,9.0,"12,65"',
    "1,123,NORMAL,2022-04-07,Kmovie,1.0,9233.0,720.0,1280.0,6355810746,9.0,12",
    "2,456,AD,2022-04-08,ShortImport,0.0,,720.0,1280.0,6355810746,4.0,65",
    "3,456,NORMAL,,ShortCamera,1.0,218066.0,1080.0,1920.0,6618412736,,",
)  # video 4 is shown, but not in the table
ONE_HOT = ",0,1,17,638,2.0,0,1,6,3,0,2,3,0.0,0.0,0.0,0.0,,1.0"
USERS = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,"
    "follow_user_num,follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,"
    "friend_user_num_range,register_days,register_days_range,"
    + ",".join(f"onehot_feat{k}" for k in range(18)),
    '0,full_active,0,0,1,5,"(0,10]",312,"[100,1k)",0,0,3624,730+' + ONE_HOT,
    '1,UNKNOWN,1,0,0,120,"(100,150]",0,0,3,"[1,5)",107,91-180' + ONE_HOT.replace(",,", ",0.0,"),
)  # user 2 is shown videos, but is not in the table
BEIJING = datetime.timezone(datetime.timedelta(hours=8))
PICKED = "0"  # the user of the events picked below


def milliseconds(text: str) -> int:
    return int(datetime.datetime.fromisoformat(text).replace(tzinfo=BEIJING).timestamp() * 1_000)


def line(user, video, when: str, outcome=(0, 0, 0), played=0, duration=10_000, tab=1, rand=0):
    """A row as published; outcome is click, like and long view."""
    time = milliseconds(when)
    date = when[:10].replace("-", "")
    click, like, long_view = outcome
    return (
        f"{user},{video},{date},{int(when[11:13])}00,{time},{click},{like},0,0,0,0,"
        f"{long_view},{played},{duration},0,0,0,{rand},{tab}"
    )


def write_files(folder, last_outcome=(1, 1, 1), last_played=12_000) -> None:
    first, second, random = [], [], []
    for day in range(8, 21):  # what gives every video, tab and user ids of their own
        for user in range(3):
            for video in range(5):
                when = f"2022-04-{day:02}T10:0{user}:{video * 10:02}"
                outcome = (1, int(user == 1 and video == 4), video % 2)
                first.append(line(user, video, when, outcome, played=day * 1_000, tab=video % 2))
    first += [
        line(PICKED, 0, "2022-04-21T23:59:58.001", (1, 0, 0), played=4_000, duration=0, tab=0),
        line(PICKED, 1, "2022-04-21T23:59:59.001", (1, 0, 1), played=5_000, duration=10_000),
        line(PICKED, 2, "2022-04-21T23:59:59.999", (0, 0, 0), played=99_000, duration=10_000),
    ]
    second += [
        line(PICKED, 3, "2022-04-22T00:00:00.000", played=0, duration=0),
        line(PICKED, 0, "2022-04-24T23:59:59.999"),
        line(PICKED, 4, "2022-05-08T23:00:00.000", last_outcome, last_played),
    ]
    random.append(line(PICKED, 1, "2022-04-26T00:00:00.000", (1, 1, 1), rand=1))
    folder.mkdir(parents=True)
    logs = {
        "log_standard_4_08_to_4_21_1k.csv": first,
        "log_standard_4_22_to_5_08_1k.csv": second,
        "log_random_4_22_to_5_08_1k.csv": random,
    }
    for name, lines in logs.items():
        (folder / name).write_text("\n".join([LOG_HEADER, *lines]) + "\n")
    (folder / "video_features_basic_1k.csv").write_text("\n".join(VIDEOS) + "\n")
    (folder / "user_features_1k.csv").write_text("\n".join(USERS) + "\n")


def prepare_files(root, **changes) -> RequestDataset:
    write_files(root / "KuaiRand-1K" / "data", **changes)
    return RequestDataset(prepare("kuairand/1k", root / "prepared", manual_dir=root))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return prepare_files(tmp_path_factory.mktemp("kuairand"))


def ids(dataset, name) -> dict[str, int]:
    return log_oracle.feature_ids(dataset.directory, name)


def picked(dataset):
    """The picked user's record, and the times of its last five requests; users are in order."""
    record = dataset.record(0)
    origin = dataset.metadata["time_origin"]
    times = [datetime.datetime.fromtimestamp(t + origin, BEIJING).isoformat()[5:19]
             for t in record.request_time[-5:].tolist()]  # fmt: skip
    return record, times


def test_splits_begin_at_midnight_in_beijing(dataset):
    record, times = picked(dataset)
    assert list(zip(times, record.request_split[-5:].tolist(), strict=True)) == [
        ("04-21T23:59:58", 0),
        ("04-21T23:59:59", 0),
        ("04-22T00:00:00", 1),
        ("04-24T23:59:59", 1),
        ("05-08T23:00:00", 2),
    ]
    assert record.request["hour"][-5:].tolist() == [23, 23, 0, 23, 23]
    assert record.request["weekday"][-5:].tolist() == [3, 3, 4, 6, 6]  # a Friday from the third on


def test_videos_of_one_second_are_a_request_and_not_each_others_history(dataset):
    record, _ = picked(dataset)
    item = ids(dataset, "item")
    before = 13 * 5
    assert record.history_end[-5:].tolist() == [before + n for n in (0, 1, 3, 4, 6)]
    t = slice(*record.target_offset[-5:-3])
    assert sorted(record.target["item"][t].tolist()) == sorted([item["1"], item["2"]])
    labels = dict(zip(record.target["item"][t].tolist(), record.label[t].tolist(), strict=True))
    assert labels == {item["1"]: [1, 1, 0], item["2"]: [0, 0, 0]}  # click, long view, like
    assert record.label[-1].tolist() == [1, 1, 1]


def test_a_random_impression_is_history_only(dataset):
    record, _ = picked(dataset)
    assert record.history["item"][-2] == ids(dataset, "item")["1"]
    assert [record.history[n][-2] for n in ("click", "long_view", "like")] == [2, 2, 2]  # unknown


def test_features_of_an_event(dataset):
    record, _ = picked(dataset)
    tab, item = ids(dataset, "tab"), ids(dataset, "item")
    history = {n: v[13 * 5 : 13 * 5 + 3] for n, v in record.history.items()}
    event = {v: k for k, v in enumerate(history["item"].tolist())}
    zero, one, two = (event[item[v]] for v in "012")
    assert history["tab"][[zero, one]].tolist() == [tab["0"], tab["1"]]
    assert [history[n][one] for n in ("click", "long_view", "like")] == [1, 1, 0]
    assert history["author"][zero] == history["author"][one] != history["author"][two]
    assert history["tag"][zero] == history["tag"][one] != history["tag"][two]  # the first of two
    assert history["music"][one] == history["music"][two] != history["music"][zero]
    assert history["video_type"][zero] == history["video_type"][one] != history["video_type"][two]

    with open(dataset.directory.parents[3] / "KuaiRand-1K/data/log_standard_4_08_to_4_21_1k.csv",
              newline="") as file:  # fmt: skip
        rows = list(csv.DictReader(file))
    ratio = [min(int(r["play_time_ms"]) / max(int(r["duration_ms"]), 1), 5) for r in rows]
    mean, deviation = statistics.fmean(ratio), statistics.pstdev(ratio)
    expected = [(x - mean) / deviation for x in (5, 0.5, 5)]  # of duration 0; half; 9.9 times
    np.testing.assert_allclose(history["watched"][[zero, one, two]], expected, rtol=1e-5)
    np.testing.assert_allclose(record.history["watched"][13 * 5 + 3], -mean / deviation, rtol=1e-5)
    assert history["duration"][two] == 0  # missing: the mean


def test_unlisted_videos_and_users_have_no_features_and_stay(dataset):
    item = ids(dataset, "item")
    record, _ = picked(dataset)
    unlisted = record.history["item"] == item["4"]
    assert unlisted.sum() == 14
    for name in ("author", "video_type", "music", "tag"):
        (missing,) = set(record.history[name][unlisted].tolist())
        listed = set(record.history[name][np.isin(record.history["item"], [item["0"], item["1"]])])
        assert missing not in listed
    names = dataset.schema.request[2:]  # after hour and weekday
    assert len(names) == 7
    users = [[int(dataset.record(u).request[n][0]) for n in names] for u in range(3)]
    differing = [n for n, a, b in zip(names, *users[:2], strict=True) if a != b]
    assert differing == [n for n in names if n != "is_live_streamer"]
    assert all(c not in (a, b) for a, b, c in zip(*users, strict=True))


def test_what_came_of_an_impression_is_no_feature_of_its_target(dataset, tmp_path):
    other = prepare_files(tmp_path, last_outcome=(0, 0, 0), last_played=0)
    (a, _), (b, _) = picked(dataset), picked(other)
    assert a.label[-1].tolist() != b.label[-1].tolist()
    for name in dataset.schema.target:
        np.testing.assert_array_equal(a.target[name], b.target[name], err_msg=name)
    for name in dataset.schema.history:  # of all events before it
        np.testing.assert_array_equal(a.history[name][:-1], b.history[name][:-1], err_msg=name)


def unirank_rows():
    """By file: a user is shown a video each day of both months; which, and what came, cycles."""
    rows = {"log_standard_4_08_to_4_21": [], "log_standard_4_22_to_5_08": [],
            "log_random_4_22_to_5_08": []}  # fmt: skip
    days = [f"2022-04-{d:02}" for d in range(8, 31)] + [f"2022-05-{d:02}" for d in range(1, 9)]
    for k, day in enumerate(days):
        name = "log_standard_4_08_to_4_21" if day <= "2022-04-21" else "log_standard_4_22_to_5_08"
        for user in range(3):
            for n in range(4):
                outcome = [(k + user + n + task) % 2 for task in range(6)]
                rows[name].append((user, (k + n) % 5, f"{day}T1{n}:00:00", outcome, 0))
    rows["log_random_4_22_to_5_08"] = [
        (0, 1, "2022-05-02T23:59:59", [1, 1, 1, 1, 1, 1], 1),
        (0, 1, "2022-05-03T00:00:00", [0, 0, 0, 0, 0, 0], 1),
        (0, 2, "2022-05-06T00:00:00", [1, 0, 1, 0, 1, 0], 1),
    ]
    return rows


def unirank_line(user, video, when, outcome, is_random):
    """`outcome` is click, follow, like, comment, forward and long view."""
    click, follow, like, comment, forward, long_view = outcome
    return (
        f"{user},{video},{when[:10].replace('-', '')},{int(when[11:13])}00,{milliseconds(when)},"
        f"{click},{like},{follow},{comment},{forward},0,{long_view},0,10000,0,0,0,{is_random},1"
    )


def test_unirank_has_all_impressions_as_targets_of_six_tasks_split_by_date(tmp_path):
    folder = tmp_path / "KuaiRand-1K" / "data"
    write_files(folder)
    rows = unirank_rows()
    for name, of_log in rows.items():
        lines = [LOG_HEADER, *(unirank_line(*row) for row in of_log)]
        (folder / f"{name}_1k.csv").write_text("\n".join(lines) + "\n")
    prepared = prepare("kuairand/unirank_1k", tmp_path / "prepared", manual_dir=tmp_path)
    dataset = RequestDataset(prepared)
    assert dataset.schema.tasks == (
        "is_click", "is_follow", "is_like", "is_comment", "is_forward", "long_view",
    )  # fmt: skip
    item = {v: k for k, v in ids(dataset, "item").items()}
    origin = dataset.metadata["time_origin"]
    found = set()
    for user in range(3):
        record = dataset.record(user)
        for k, time in enumerate((record.request_time + origin).tolist()):
            when = datetime.datetime.fromtimestamp(time, BEIJING).isoformat()[:19]
            for t in range(*record.target_offset[k : k + 2]):
                shown = (user, int(item[record.target["item"][t]]), when)
                label = tuple(record.label[t].astype(int).tolist())
                found.add((*shown, label, int(record.request_split[k])))
    expected = set()
    for of_log in rows.values():
        for user, video, when, outcome, _ in of_log:
            split = int(when >= "2022-05-03") + int(when >= "2022-05-06")
            expected.add((user, video, when, tuple(outcome), split))
    assert found == expected
    assert len(dataset.schema.request) == 2 + 26  # hour and weekday
    # Of 0, 3, 7, 15, 30 and 60 seconds, how many a duration exceeds: 6, 3, none (missing), 6.
    history = dataset.record(0).history
    pairs = zip(history["item"].tolist(), history["duration"].tolist(), strict=True)
    bucket = {item[i]: d for i, d in pairs}
    assert bucket["0"] == bucket["3"]
    assert len({bucket[video] for video in "012"}) == 3
