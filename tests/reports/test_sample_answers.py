from opd.reports.page.answers import sample_answers


def test_a_sample_answer_says_who_wrote_it_and_how_it_was_graded():
    row = {"step": 1, "id": "a", "prompt": "p", "response": "r", "finish_reason": "stop"}
    assert "written by" not in sample_answers([{**row, "behaviour": "student"}], most=1, size=99)
    assert "reward" not in sample_answers([row], most=1, size=99)
    page = sample_answers([{**row, "behaviour": "teacher_mixed", "reward": 0.0}], most=1, size=99)
    assert ">a, written by: teacher mixed, reward 0</p>" in page
    assert "<b>" not in sample_answers([{**row, "behaviour": "<b>"}], most=1, size=99)
