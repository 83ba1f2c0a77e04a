"""A user's place is on disk, so the hash must stay as it is."""

from lib.data.user_hash import part_of, user_hash

USERS = ("alice", "bob", "ünï", "日本", "")


def test_a_user_has_the_same_hash_for_good():
    assert [user_hash(user).hex() for user in USERS] == [
        "4deaec0cce54da89",
        "74f32b2bb966a492",
        "5861af09ba88cd97",
        "e83335cfe1549b3a",
        "e4a6a0577479b2b4",
    ]
    assert [part_of(user, 4) for user in USERS] == [1, 2, 3, 2, 0]


def test_another_salt_gives_another_hash_and_a_long_one_is_cut():
    assert user_hash("alice", "salt") != user_hash("alice")
    assert user_hash("alice", "x" * 64) == user_hash("alice", "x" * 70)
