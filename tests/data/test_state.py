from ltx_titan.data import DataPosition, resume_step

POSITION = DataPosition(samples_seen=96, global_batch_size=8, fingerprint="a" * 32)


def test_position_survives_its_plain_form():
    assert DataPosition.from_dict(POSITION.to_dict()) == POSITION


def test_unchanged_job_goes_on_with_the_next_batch_and_nothing_to_say():
    assert resume_step(POSITION, global_batch_size=8, fingerprint="a" * 32) == (12, [])


def test_changed_batch_size_keeps_the_number_of_samples_and_says_so():
    batch, (note,) = resume_step(POSITION, global_batch_size=32, fingerprint="a" * 32)
    assert batch == 3
    assert "from 8 to 32" in note
    assert "again" not in note
    batch, (note,) = resume_step(POSITION, global_batch_size=10, fingerprint="a" * 32)
    assert batch == 9
    assert "6 of them are counted again" in note


def test_changed_data_is_reported():
    batch, (note,) = resume_step(POSITION, global_batch_size=8, fingerprint="b" * 32)
    assert batch == 12
    assert "aaaaaaaa -> bbbbbbbb" in note
