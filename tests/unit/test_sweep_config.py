"""The section sweep: its space, objectives and constraints, the trials that it gives, and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raydiv.config import Recipe, load_recipe, save_recipe, with_changes
from raydiv.config.sweep import Interval, SearchParameter, SweepObjective
from raydiv.experiments.sweep.metric_names import full_metric_names
from raydiv.experiments.sweep.space import MAX_CHECKED, draw, encode, grid, representatives, trial_recipes
from raydiv.utils.errors import UserError

SPACE = {
    "loss.divergence": ["kl", "alpha"],
    "loss.alpha": {"in": "uniform(0.2, 0.8)", "when": {"loss.divergence": "alpha"}},
    "optim.lr": "loguniform(1e-5, 1e-3)",
}


def maximize(metric: str) -> dict[str, str]:
    return {"metric": metric, "direction": "maximize"}


def minimize(metric: str) -> dict[str, str]:
    return {"metric": metric, "direction": "minimize"}


def recipe_with(sweep: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    default = {"space": SPACE, "objectives": [maximize("reward/margin")], "search": "tpe", "trials": 5}
    tree: dict[str, Any] = {
        "model": {"id": "nowhere"},
        "loss": {"type": "fdo"},
        "optim": {"steps": 10},
        "sweep": default | (sweep or {}),
    }
    return load_recipe(tree | sections)


def test_space_is_saved_and_loaded(tmp_path: Path) -> None:
    recipe = recipe_with()
    assert recipe.sweep is not None
    assert recipe.sweep.parameters == [
        SearchParameter("loss.divergence", ("kl", "alpha"), {}),
        SearchParameter("loss.alpha", Interval("uniform", 0.2, 0.8), {"loss.divergence": ("alpha",)}),
        SearchParameter("optim.lr", Interval("loguniform", 1e-5, 1e-3), {}),
    ]
    save_recipe(recipe, tmp_path / "recipe.yaml")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again.sweep is not None
    assert again.sweep.parameters == recipe.sweep.parameters


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("uniform(0, 1)", (0, 1)),
        ("quniform(0, 1, 0.25)", (0, 1)),
        ("randint(1, 5)", (1, 4)),
        ("lograndint(1, 100)", (1, 99)),
        (" loguniform( 1e-5 , 1E-3 ) ", (1e-5, 1e-3)),
    ],
)
def test_intervals_have_the_names_and_ends_of_ray_tune(text: str, ends: tuple[float, float]) -> None:
    recipe = recipe_with({"space": {"optim.lr": text}})
    assert recipe.sweep is not None
    (parameter,) = recipe.sweep.parameters
    assert isinstance(parameter.values, Interval)
    assert parameter.values.ends == ends


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"space": {}}, r"sweep\.space: .*at least 1"),
        ({"space": {"loss.beta": []}}, r"loss\.beta: .*empty"),
        ({"space": {"loss.beta": [0.1, 0.1]}}, r"loss\.beta: duplicate choice 0\.1"),
        ({"space": {"loss.beta": 0.1}}, r"loss\.beta: .*uniform.*found 0\.1"),
        ({"space": {"loss.beta": "normal(0, 1)"}}, r"loss\.beta: .*uniform.*found 'normal\(0, 1\)'"),
        ({"space": {"loss.beta": "uniform(0.1)"}}, r"uniform takes 2 numbers, found \(0\.1\)"),
        ({"space": {"loss.beta": "uniform(a, b)"}}, r"uniform takes 2 numbers, found \(a, b\)"),
        ({"space": {"loss.beta": "uniform(0.1, inf)"}}, r"uniform takes 2 numbers, found \(0\.1, inf\)"),
        ({"space": {"loss.beta": "uniform(1, 0.1)"}}, r"uniform\(1, 0\.1\) is empty"),
        ({"space": {"optim.warmup": "randint(3, 4)"}}, r"randint\(3, 4\) is empty"),
        ({"space": {"optim.warmup": "randint(0, 2.5)"}}, r"randint .*whole numbers"),
        ({"space": {"loss.beta": "loguniform(0, 1)"}}, r"loguniform .*above 0"),
        ({"space": {"loss.beta": "quniform(0, 1, 2)"}}, r"quniform .*step between 0 and 1, found 2"),
        ({"space": {"name": ["a", "b"]}}, r"name: cannot be searched"),
        ({"space": {"cluster.num_workers": [1, 2]}}, r"cluster\.num_workers: cannot be searched"),
        (
            {"space": {"loss.alpha": {"in": [0.5], "when": {"loss.divergence": "alpha"}}}},
            r"loss\.alpha: when: loss\.divergence must be a key of the space",
        ),
        (
            {"space": {"loss.type": ["dpo", "kto"], "loss.beta": {"in": [0.5], "when": {"loss.type": "dpoo"}}}},
            r"loss\.beta: when: loss\.type is never 'dpoo': .*'dpo', 'kto'",
        ),
        (
            {"space": {"loss.beta": "uniform(0, 1)", "optim.lr": {"in": [1], "when": {"loss.beta": 0.5}}}},
            r"optim\.lr: when: loss\.beta must be a list.*uniform\(0, 1\)",
        ),
        ({"space": {"loss.alpha": {"in": [0.5]}}}, r"loss\.alpha: .*\{in: VALUES, when: \{KEY: CHOICES\}\}"),
        ({"search": "grid", "trials": None}, r"search: grid .*loss\.alpha is uniform\(0\.2, 0\.8\)"),
        ({"search": "grid", "space": {"loss.beta": [1, 2]}}, r"trials .*search: grid"),
        ({"trials": None}, r"search: tpe needs trials"),
        ({"scheduler": "pbt"}, r"sweep\.scheduler: population-based training"),
        ({"grace": 3}, r"grace needs scheduler: asha"),
        ({"scheduler": "asha", "objectives": [maximize("a"), minimize("b")]}, r"scheduler: asha .*set stop_on"),
        ({"scheduler": "asha", "stop_on": "loss"}, r"sweep\.stop_on: 'loss'"),
        ({"scheduler": "asha", "stop_on": {"metric": "loss"}}, r"sweep\.stop_on\.direction: missing"),
        ({"scheduler": "asha", "reduction": 1}, r"sweep\.reduction"),
        ({"objectives": []}, r"sweep\.objectives: .*at least 1"),
        (
            {"objectives": [{"metric": "d", "direction": "up"}]},
            r"sweep\.objectives\.0\.direction: .*'maximize' or 'minimize'",
        ),
        (
            {"objectives": [{"metric": "d", "direction": "maximize", "max": 1}]},
            r"sweep\.objectives\.0\.max: unknown key",
        ),
        ({"objectives": [maximize("a"), minimize("a")]}, r"sweep\.objectives: a occurs twice"),
        ({"constraints": [{"metric": "b"}]}, r"sweep\.constraints.*b: needs either max or min"),
        ({"constraints": [{"metric": "b", "max": 1, "min": 0}]}, r"sweep\.constraints.*b: needs either max or min"),
        ({"constraints": [{"metric": "b", "mx": 1}]}, r"sweep\.constraints\.0\.mx: unknown key \(did you mean max"),
        ({"constraints": [{"metric": "b", "max": "high"}]}, r"sweep\.constraints\.0\.max: .*found 'high'"),
        ({"goal": "maximize a"}, r"sweep: goal and objectives are both set"),
        ({"seach": "tpe"}, r"sweep\.seach: unknown key \(did you mean search\?\)"),
    ],
)
def test_invalid_sweeps(sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe_with(sweep)


def test_objectives_and_constraints(tmp_path: Path) -> None:
    objectives = [maximize("separation/d_b"), minimize("evaluate/asr")]
    constraints = [{"metric": "over_refusal", "max": 0.1}, {"metric": "capability/mmlu/acc", "min": "-2e-1"}]
    recipe = recipe_with({"objectives": objectives, "constraints": constraints})
    sweep = recipe.sweep
    assert sweep is not None
    assert sweep.objectives == [
        SweepObjective(metric="separation/d_b", direction="maximize"),
        SweepObjective(metric="evaluate/asr", direction="minimize"),
    ]
    assert [objective.sign for objective in sweep.objectives] == [1, -1]
    assert [(constraint.relation, constraint.bound) for constraint in sweep.constraints] == [("<=", 0.1), (">=", -0.2)]
    assert sweep.constraints[0].violation(0.25) == pytest.approx(0.15)
    assert sweep.constraints[1].violation(-0.1) == pytest.approx(-0.1)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml").model_dump() == recipe.model_dump()


GOAL = "maximize separation/d_b, minimise evaluate/asr subject to over_refusal <= 0.1 and capability/mmlu/acc >= -2e-1"


def older_recipe(sweep: dict[str, Any]) -> Recipe:
    """A recipe with the key ``goal``, the older form of objectives and constraints."""
    section = {"space": SPACE, "search": "tpe", "trials": 5, **sweep}
    return load_recipe({"model": {"id": "nowhere"}, "loss": {"type": "fdo"}, "optim": {"steps": 10}, "sweep": section})


def test_goal_of_an_older_recipe(tmp_path: Path) -> None:
    objectives = [maximize("separation/d_b"), minimize("evaluate/asr")]
    constraints = [{"metric": "over_refusal", "max": 0.1}, {"metric": "capability/mmlu/acc", "min": -0.2}]
    stop_on = {"scheduler": "asha", "stop_on": "minimize loss"}
    older = older_recipe({"goal": GOAL, **stop_on})
    newer = recipe_with({"objectives": objectives, "constraints": constraints, **stop_on, "stop_on": minimize("loss")})
    assert older.model_dump() == newer.model_dump()
    assert older.sweep is not None
    assert older.sweep.goal == GOAL.replace("minimise", "minimize").replace("-2e-1", "-0.2")
    save_recipe(older, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml").model_dump() == newer.model_dump()


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ("separation/d_b", "'separation/d_b' is not an objective"),
        ("maximize a, maximize a", r"sweep\.objectives: a occurs twice"),
        ("maximize a subject to b < 0.1", "'b < 0.1' is not a constraint"),
        ("maximize a subject to b <= 1.2.3", r"sweep\.constraints\.0\.max: .*'1\.2\.3'"),
    ],
)
def test_invalid_goals(goal: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        older_recipe({"goal": goal})


LISTS = {
    "loss.divergence": ["kl", "alpha"],
    "loss.alpha": {"in": [0.3, 0.6], "when": {"loss.divergence": ["alpha"]}},
    "loss.beta": [0.1, 0.2],
}


def test_grid_has_a_parameter_only_where_it_applies() -> None:
    sweep = recipe_with({"space": LISTS, "search": "grid", "trials": None}).sweep
    assert sweep is not None
    assert grid(sweep.parameters) == [
        {"loss.divergence": "kl", "loss.beta": 0.1},
        {"loss.divergence": "kl", "loss.beta": 0.2},
        {"loss.divergence": "alpha", "loss.alpha": 0.3, "loss.beta": 0.1},
        {"loss.divergence": "alpha", "loss.alpha": 0.3, "loss.beta": 0.2},
        {"loss.divergence": "alpha", "loss.alpha": 0.6, "loss.beta": 0.1},
        {"loss.divergence": "alpha", "loss.alpha": 0.6, "loss.beta": 0.2},
    ]


def test_representatives_of_tpe_are_the_corners() -> None:
    assert representatives(recipe_with()) == [
        {"loss.divergence": "kl", "optim.lr": 1e-5},
        {"loss.divergence": "kl", "optim.lr": 1e-3},
        {"loss.divergence": "alpha", "loss.alpha": 0.2, "optim.lr": 1e-5},
        {"loss.divergence": "alpha", "loss.alpha": 0.2, "optim.lr": 1e-3},
        {"loss.divergence": "alpha", "loss.alpha": 0.8, "optim.lr": 1e-5},
        {"loss.divergence": "alpha", "loss.alpha": 0.8, "optim.lr": 1e-3},
    ]


def test_draws_are_distinct_and_fewer_are_the_first_of_more() -> None:
    sweep = recipe_with().sweep
    assert sweep is not None
    few, many = draw(sweep.parameters, 10, seed=3), draw(sweep.parameters, 30, seed=3)
    assert many[:10] == few
    assert draw(sweep.parameters, 10, seed=4) != few
    assert len({json.dumps(values) for values in many}) == 30
    for values in many:
        assert ("loss.alpha" in values) == (values["loss.divergence"] == "alpha")
        assert 1e-5 <= values["optim.lr"] <= 1e-3
        assert 0.2 <= values.get("loss.alpha", 0.5) <= 0.8
        assert len(f"{values['optim.lr']:e}".partition("e")[0].rstrip("0")) <= 5
    assert encode(sweep.parameters, {"loss.divergence": "alpha", "optim.lr": 1e-4}) == {
        "loss.divergence": 1,
        "optim.lr": 1e-4,
    }


def test_small_space_is_drawn_completely() -> None:
    sweep = recipe_with({"space": {"loss.beta": [0.1, 0.2, 0.3]}}).sweep
    assert sweep is not None
    assert sorted(values["loss.beta"] for values in draw(sweep.parameters, 9, seed=0)) == [0.1, 0.2, 0.3]


def test_each_trial_has_a_recipe() -> None:
    recipe = recipe_with({"space": LISTS, "search": "grid", "trials": None})
    recipes = trial_recipes(recipe, representatives(recipe))
    assert [trial.loss.options for trial in recipes[1:4:2]] == [
        {"beta": 0.2, "divergence": "kl", "alpha": 0.5},
        {"beta": 0.2, "divergence": "alpha", "alpha": 0.3},
    ]
    assert all(trial.sweep is None for trial in recipes)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"loss.bta": [0.1]}, "with loss.bta=0.1: loss.bta: unknown key"),
        ({"optm.lr": [0.1]}, "optm: unknown key (did you mean optim?)"),
        ({"loss.beta": "uniform(-1, 1)"}, "with loss.beta=-1.0: loss.beta: input should be greater than 0"),
        ({"loss.type": ["fdo", "bogus"]}, "with loss.type=bogus: loss.type: no loss 'bogus'"),
        # a divergence's own parameter without its condition
        ({"loss.divergence": ["kl"], "loss.alpha": [0.5]}, "without divergence: alpha"),
    ],
)
def test_invalid_values_of_a_space(space: dict[str, Any], message: str) -> None:
    recipe = recipe_with({"space": space})
    with pytest.raises(UserError) as error:
        trial_recipes(recipe, representatives(recipe))
    assert message in str(error.value)
    assert str(error.value).startswith("sweep.space: ")


def test_another_loss_keeps_the_options_of_both() -> None:
    recipe = recipe_with(loss={"type": "kldo", "skew": 0.5, "beta": 0.3, "mix": {"sft": {"weight": 1.0}}})
    other = with_changes(recipe, {"loss.type": "dpo"})
    assert (other.loss.type, other.loss.beta, len(other.loss.terms)) == ("dpo", 0.3, 2)
    # an option that is a default of another choice
    alpha = recipe_with(loss={"type": "fdo", "divergence": "alpha"})
    assert with_changes(alpha, {"loss.divergence": "kl"}).loss.options["divergence"] == "kl"


def test_loss_and_its_options_change_together() -> None:
    recipe = recipe_with(loss={"type": "dpo", "label_smoothing": 0.1})
    assert with_changes(recipe, {"loss.skew": 0.25, "loss.type": "kldo"}).loss.options["skew"] == 0.25


BASE = ["separation/d_b", "evaluate/asr", "evaluate/over_refusal", "evaluate/over_refusal_set/x"]


def names_of(*objectives: dict[str, str], **sections: Any) -> dict[str, str]:
    recipe = recipe_with(
        {"objectives": list(objectives), **sections.pop("sweep", {})},
        evaluate={"prompts": "bundled:heldout", **sections.pop("evaluate", {})},
        data={"eval": 0.1},
        **sections,
    )
    return full_metric_names(recipe, trial_recipes(recipe, representatives(recipe)), BASE)


def test_metrics_are_found_by_the_end_of_their_names() -> None:
    objectives = [maximize("d_b"), minimize("eval/loss"), maximize("evaluate/kl")]
    assert names_of(*objectives, sweep={"constraints": [{"metric": "over_refusal", "max": 0.1}]}) == {
        "d_b": "separation/d_b",
        "eval/loss": "eval/loss",
        "evaluate/kl": "evaluate/kl",
        "over_refusal": "evaluate/over_refusal",
    }


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("separation/db", r"sweep\.objectives: separation/db: no trial reports it \(did you mean separation/d_b\?\)"),
        ("evaluate/win_rate", r"sweep\.objectives: evaluate/win_rate: no trial reports it"),
        ("margin", r"sweep\.objectives: margin: .*eval/reward/margin or reward/margin"),
    ],
)
def test_unknown_and_ambiguous_metrics(metric: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        names_of(maximize(metric))


def test_unknown_metric_of_a_constraint_with_the_known_ones() -> None:
    message = r"sweep\.constraints: bogus: no trial reports it .*evaluate/asr.*tokens_per_second"
    with pytest.raises(UserError, match=message):
        names_of(maximize("reward/margin"), sweep={"constraints": [{"metric": "bogus", "max": 1}]})


def test_asha_needs_a_metric_during_training() -> None:
    asha = {"scheduler": "asha"}
    with pytest.raises(UserError, match=r"sweep\.objectives: separation/d_b: .*during training.*separation\.every"):
        names_of(maximize("separation/d_b"), sweep=asha)
    with pytest.raises(UserError, match=r"sweep\.objectives: eval/loss: .*during training.*evaluate\.every"):
        names_of(minimize("eval/loss"), sweep=asha)
    with pytest.raises(UserError, match=r"sweep\.stop_on: eval/loss: .*during training"):
        names_of(maximize("d_b"), sweep={**asha, "stop_on": minimize("eval/loss")})
    assert names_of(minimize("eval/loss"), sweep=asha, evaluate={"every": 5}) == {"eval/loss": "eval/loss"}
    assert names_of(maximize("d_b"), sweep=asha, separation={"every": 5}) == {"d_b": "separation/d_b"}
    names = names_of(maximize("d_b"), maximize("evaluate/asr"), sweep={**asha, "stop_on": minimize("grad_norm")})
    assert names["grad_norm"] == "grad_norm"


def test_each_choice_and_end_of_a_large_space_is_checked() -> None:
    space: dict[str, Any] = {"loss.type": ["kldo", "nonsense"]}
    space |= {f"optim.{name}": "uniform(0.1, 0.9)" for name in ("lr", "weight_decay", "clip", "eps", "target_margin")}
    space |= {f"model.lora.{name}": ["a", "b", "c", "d", "e", "f"] for name in ("r", "alpha", "dropout")}
    corners = representatives(recipe_with({"space": space}))
    assert MAX_CHECKED <= len(corners) <= MAX_CHECKED + 40
    for key, text in space.items():
        expected = text if isinstance(text, list) else [0.1, 0.9]
        assert {values[key] for values in corners} == set(expected), key


def test_numbers_are_written_exactly() -> None:
    sweep = recipe_with(
        {"space": {"optim.steps": "randint(1, 1234568)", "optim.lr": "uniform(1.00000001e-5, 0.1)"}}
    ).sweep
    assert sweep is not None
    assert [parameter.as_yaml() for parameter in sweep.parameters] == [
        "randint(1, 1234568)",
        "uniform(1.00000001e-05, 0.1)",
    ]


def test_draws_are_multiples_of_the_step() -> None:
    sweep = recipe_with({"space": {"loss.beta": "quniform(0, 1, 0.03125)"}}).sweep
    assert sweep is not None
    assert all((values["loss.beta"] / 0.03125).is_integer() for values in draw(sweep.parameters, 20, seed=1))


def test_number_with_an_exponent_and_no_point(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {id: x}\nloss: {type: dpo}\noptim: {steps: 1}\nsweep:\n  space:\n    optim.lr: [1e-3, 1E-4, 0.5]\n"
        "    loss.beta: {in: [0.1, 0.2], when: {optim.lr: 1e-3}}\n  search: grid\n"
        "  objectives: [{metric: loss, direction: minimize}]\n"
    )
    sweep = load_recipe(path).sweep
    assert sweep is not None
    assert [parameter.values for parameter in sweep.parameters] == [(0.001, 0.0001, 0.5), (0.1, 0.2)]
    assert len(grid(sweep.parameters)) == 4
