"""The faults that `mutations.py` plants: a line each."""

# ruff: noqa: E501 - a fault is one line
# fmt: off

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """A fault: its name, the file, the text to replace, the text in its place, and its tests."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _fault(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name, f"pyrolora/{file}.py", old, new, tuple(f"tests/{test}" for test in tests))


FAULTS = (
    # The objective.
    _fault("montec's guide is not tempered", "guides/montec_program", "    def guide(self, kl_weight: float = 1.0) -> None:\n        with tempered(kl_weight):", "    def guide(self, kl_weight: float = 1.0) -> None:\n        with tempered(1.0):", "guides/test_objective.py::test_beta_scales_each_kl_once"),
    _fault("a guide of factors is not tempered", "guides/factor_program", "    def guide(self, kl_weight: float = 1.0) -> None:\n        with tempered(kl_weight):", "    def guide(self, kl_weight: float = 1.0) -> None:\n        with tempered(1.0):", "guides/test_objective.py::test_beta_scales_each_kl_once"),
    _fault("the KL is scaled by the model's scale too", "inference/elbo", 'guide_sites[name]["scale"])', 'guide_sites[name]["scale"] * site["scale"])', "guides/test_objective.py::test_beta_scales_each_kl_once"),
    _fault("the KL is that of the prior to the guide", "inference/elbo", 'divergence(guide_site["fn"], site["fn"])', 'divergence(site["fn"], guide_site["fn"])', "inference/test_elbo.py::test_equals_pyros_at_the_same_draw_on_every_path"),
    _fault("the guide is sampled under autocast", "model/joint", "            torch.autocast(device_of(self).type, enabled=False),\n", "", "guides/test_objective.py::test_sites_and_factors_are_the_same_under_autocast"),
    _fault("the prior is sampled under autocast", "model/joint", "with torch.autocast(device_of(self).type, enabled=False):", "if True:", "guides/test_objective.py::test_sites_and_factors_are_the_same_under_autocast"),
    _fault("the draws of a batch are summed, not averaged", "guides/plates", "poutine.scale(scale=1 / count)", "poutine.scale(scale=1.0)", "guides/test_objective.py::test_draws_of_a_batch_are_averaged"),
    _fault("beta against the mean is beta", "guides/options", 'factor = num_examples if self.kl_weight_against == "mean" else 1', "factor = 1", "guides/test_montec.py::test_weight_rises_during_warmup_and_can_be_against_the_mean"),
    _fault("the warm-up lasts for the whole training", "guides/options", "min(1.0, progress / self.kl_warmup)", "min(1.0, progress)", "guides/test_montec.py::test_weight_rises_during_warmup_and_can_be_against_the_mean"),
    _fault("the likelihood of a batch is not scaled to all rows", "tasks/base", "poutine.scale(scale=rows / size)", "poutine.scale(scale=1.0)", "inference/test_training.py::test_objective_does_not_depend_on_accumulation_or_micro_batch_sizes"),
    _fault("micro-batches count alike, whatever their size", "inference/trainer", "share = _size(inputs) * self.accelerator.num_processes / num_items_in_batch", "share = 1 / self.args.gradient_accumulation_steps", "inference/test_training.py::test_objective_does_not_depend_on_accumulation_or_micro_batch_sizes"),
    _fault("NUTS without 1/beta", "inference/mcmc", "poutine.scale(scale=1 / beta)", "poutine.scale(scale=1.0)", "guides/test_nuts.py::test_the_target_of_the_chains_is_the_prior_times_the_likelihood_to_one_over_beta"),
    _fault("NUTS is not told beta", "guides/nuts", "            beta,\n            chains=self.chains,", "            1.0,\n            chains=self.chains,", "guides/test_nuts.py::test_the_target_of_the_chains_is_the_prior_times_the_likelihood_to_one_over_beta"),
    # Priors.
    _fault("the earlier means of montec's prior move along", "guides/montec_program", "centre = self.bank.latent_part(factor, self.previous.bank.means())", "centre = self.bank.latent_part(factor, self.bank.means())", "guides/test_prior.py::test_montecs_prior_is_the_earlier_guide"),
    _fault("the earlier means of a prior move along", "guides/centred", "self.previous = copy.deepcopy(previous).requires_grad_(False)", "self.previous = copy.copy(previous)\n        self.previous._modules = {**previous._modules, 'bank': self.bank}", "guides/test_prior.py::test_two_halves_in_turn_are_the_whole_at_once"),
    _fault("the earlier posterior is trained along", "guides/centred", "copy.deepcopy(previous).requires_grad_(False)", "copy.deepcopy(previous)", "guides/test_prior.py::test_two_halves_in_turn_are_the_whole_at_once"),
    _fault("row sizes of a prior move along", "guides/centred", "if self.row_sizes is not None:", "if False:", "guides/test_prior.py::test_montecs_prior_is_the_earlier_guide"),
    _fault("a learned prior mean is not the guide's", "guides/factor_program", "            centre = self.loc(site)", "            centre = None", "guides/test_objective.py::test_means_cost_nothing_where_the_prior_is_around_them"),
    _fault("the Dirichlet prior is the guide's", "guides/montec_program", "return dist.Dirichlet(self._concentration)", 'return dist.Dirichlet(self.param("concentration"))', "guides/test_montec.py::test_named_terms_are_the_kls_of_the_sites"),
    _fault("cooperation with the other sign", "guides/montec_program", "-options.cooperation * weights", "options.cooperation * weights", "guides/test_montec.py::test_cooperation_lowers_the_log_joint_by_the_squared_weights"),
    _fault("the spread of a mixture is the square of its norm", "guides/montec_program", "else weights.norm(dim=-1)", "else weights.square().sum(-1)", "guides/test_montec.py::test_collapsed_noise_has_the_law_of_the_mixture"),
    _fault("the mean of Sigma is not the identity", "guides/montec_program", '"scale": torch.full((blocks, r), self.df**-0.5)', '"scale": torch.full((blocks, r), self.df**-1.0)', "guides/test_montec.py"),
    _fault("E of the squared norm of Dirichlet weights", "guides/mixture", "(a + 1) / (components * a + 1)", "(a + 1) / (components * a)", "inference/test_settling.py"),
    _fault("V at its optimum without beta", "guides/mixture", "mixture.squared(a) / price", "mixture.squared(a) / kappa", "inference/test_settling.py"),
    _fault("mean field at its optimum without beta", "guides/meanfield", "precision = entries / beta +", "precision = entries +", "inference/test_settling.py"),
    # The width of the noise.
    _fault("the width: the gap without beta", "inference/widths", "likeliest(beta * gap,", "likeliest(gap,", "inference/test_widths.py::test_steps_lead_to_the_optimum"),
    _fault("the width: the error of the gap without beta", "inference/widths", "error = beta**2 * spread", "error = spread", "inference/test_widths.py::test_steps_lead_to_the_optimum"),
    _fault("the width: the variance goes as the width", "inference/widths", "(2 * (grid - log_width)).exp()", "(grid - log_width).exp()", "inference/test_widths.py::test_steps_lead_to_the_optimum"),
    _fault("the width: tags one by one", "inference/widths", "joint.task.log_prob(joint", "joint.task.row_log_prob(joint", "inference/test_widths.py::test_the_tags_of_one_example_are_measured_together"),
    # Distributions.
    _fault("KL of Wisharts: the other degrees of freedom", "distributions/kl", "0.5 * p.multiplier * (trace - r)", "0.5 * q.multiplier * (trace - r)", "distributions/test_kl.py"),
    _fault("KL of Wisharts: sign of the digamma", "distributions/kl", "+ 0.5 * (p.df - q.df) * torch.digamma", "- 0.5 * (p.df - q.df) * torch.digamma", "distributions/test_kl.py"),
    _fault("KL of columns: sign of the determinant", "distributions/kl", "log_diagonal, alpha=2)", "log_diagonal, alpha=-2)", "distributions/test_kl.py"),
    _fault("KL of columns: once per row, not per entry", "distributions/kl", "(twice * p.half_weights()).sum((-2, -1))", "0.5 * twice.sum((-2, -1))", "distributions/test_kl.py"),
    _fault("KL to standard columns: without the means", "distributions/kl", "_column_divergence(p.scale_tril, _apart(p, q), p)", "_column_divergence(p.scale_tril, None, p)", "distributions/test_kl.py"),
    _fault("KL of a low-rank normal: sign of the determinant", "distributions/kl", "- 0.5 * diagonal.log()).sum(-1) - log_det", "- 0.5 * diagonal.log()).sum(-1) + log_det", "distributions/test_kl.py"),
    _fault("KL of a Kronecker normal: sign of the determinant", "distributions/kl", "_per_entry(p, q) - p.scale.log()", "_per_entry(p, q) + p.scale.log()", "distributions/test_kronecker_normal.py"),
    _fault("Wishart: degrees of freedom one too low", "distributions/wishart_cholesky", "df.unsqueeze(-1) - torch.arange(rank,", "df.unsqueeze(-1) - torch.arange(1, rank + 1,", "distributions/test_wishart_cholesky.py"),
    _fault("Wishart: the density of the matrix, not of its factor", "distributions/wishart_cholesky", "((self._chi_df() - 1) * log_diagonal)", "(self._chi_df() * log_diagonal)", "distributions/test_wishart_cholesky.py"),
    _fault("Wishart: the normalisation of the density", "distributions/wishart_cholesky", "- (0.5 * df - 1) * r * math.log(2.0)", "- 0.5 * df * r * math.log(2.0)", "distributions/test_wishart_cholesky.py"),
    _fault("Wishart: the Jacobian of its transform", "distributions/wishart_cholesky", "return x[..., : y.shape[-1]].sum(-1)", "return -x[..., : y.shape[-1]].sum(-1)", "distributions/test_wishart_cholesky.py"),
    # Curvature.
    _fault("KFAC scales the gradients once", "inference/curvature", "gradients.mul_(s**2)", "gradients.mul_(s)", "inference/test_curvature.py"),
    _fault("KFAC counts positions that nothing reads", "inference/curvature", "rows = rows[places]", "rows = rows", "inference/test_curvature.py::test_positions_that_nothing_reads_do_not_count"),
    _fault("Dirichlet KL: the gradient without that of the sum", "distributions/dirichlet", "return own + of_sum, None", "return own, None", "distributions/test_dirichlet.py"),
    _fault("KFAC sums the inputs", "inference/curvature", "inputs.div_(max(sums[name].positions, 1))", "inputs", "inference/test_curvature.py"),
    _fault("the curvature of some examples is not that of all", "inference/gauss_newton", "scale = joint.rows / max(seen, 1)", "scale = 1.0", "inference/test_gauss_newton.py"),
    _fault("the curvature in B is not scaled", "inference/gauss_newton", "total = total * program.bank.specs[name].scaling", "pass", "inference/test_gauss_newton.py"),
    _fault("the curvature of a softmax is that of independent logits", "tasks/classification", "prob.sqrt()[..., None] * (unit - probs)", "prob.sqrt()[..., None] * unit", "inference/test_curvature.py"),
    _fault("the prior's precision counts every entry as determined", "inference/evidence", "(values / (values + precision)).sum()", "(values / values).sum()", "inference/test_curvature.py"),
    _fault("the evidence with half of its determinant", "inference/dual", "value - float(factor.diagonal().log().sum())", "value - 0.5 * float(factor.diagonal().log().sum())", "inference/test_dual.py"),
    _fault("SWAG's deviations are twice too wide", "guides/swag", "(2 * (kept - 1)) ** -0.5", "(kept - 1) ** -0.5", "guides/test_swag.py"),
    _fault("the noise of flat minima does not grow", "guides/flat", "0.5 * (1 - math.cos(math.pi * self.progress))", "1.0", "guides/test_flat.py"),
    # Predictions.
    _fault("linearised draws go the other way", "predictive/linearised", "output.detach() + _directional", "output.detach() - _directional", "predictive/test_linearised.py"),
    _fault("linearised draws are not seen from the mean", "predictive/linearised", "getattr(draws, n).detach() - m for", "getattr(draws, n).detach() for", "predictive/test_linearised.py"),
    _fault("calibration scores draws, not their mixture", "predictive/calibration", "(math.log(joined.shape[1]) - joined.logsumexp(1)).sum(1)", "(-joined.mean(1)).sum(1)", "predictive/test_temperature.py"),
    _fault("logits times the temperature", "tasks/base", "else logits / self.temperature", "else logits * self.temperature", "predictive/test_temperature.py"),
    _fault("the noise of a regression times the temperature", "tasks/regression", "scale * self.temperature**0.5", "scale * self.temperature", "predictive/test_temperature.py"),
    _fault("ECE of the worst bin alone", "predictive/metrics", 'ECE_BINS, "l1")', 'ECE_BINS, "max")', "predictive/test_prediction.py", "predictive/test_reliability.py"),
    _fault("ECE in ten bins", "predictive/reliability", "ECE_BINS = 15", "ECE_BINS = 10", "predictive/test_prediction.py", "predictive/test_reliability.py"),
    _fault("the reliability table shows errors", "predictive/reliability", "right = 1 - decisions.loss.double()", "right = decisions.loss.double()", "predictive/test_reliability.py"),
    _fault("CRPS without its half", "predictive/metrics", "- 0.5 * between", "- between", "predictive/test_prediction.py"),
    _fault("conformal sets without the new example", "predictive/conformal", "math.ceil((len(scores) + 1) * mass - 1e-9)", "math.ceil(len(scores) * mass - 1e-9)", "predictive/test_conformal.py"),
    _fault("leave-one-out takes examples out at beta = 1", "diagnostics/leave_one_out", "psis(-likelihoods / beta,", "psis(-likelihoods,", "diagnostics/test_leave_one_out.py"),
    _fault("leave-one-out without the weights", "diagnostics/leave_one_out", "np.logaddexp.reduce(weights + scores, axis=-1)", "np.logaddexp.reduce(scores, axis=-1) - np.log(scores.shape[-1])", "diagnostics/test_leave_one_out.py"),
    _fault("k-hat at beta = 1", "diagnostics/importance", "scores.double().sum(-1) / beta", "scores.double().sum(-1)", "diagnostics/test_khat.py"),
    _fault("rows of a mixed pass in another order", "adapters/mixing", "drawn.repeat_interleave(blocks, 0)", "drawn.repeat(blocks, 1, 1)", "predictive/test_mixed.py"),
    _fault("settings of a mixed pass count once each", "predictive/mixed", "output.repeat_interleave(counts.to(output.device), 0)", "output", "predictive/test_mixed.py"),
    # Scales of adapters.
    _fault("rank-stabilised scaling divides by the rank", "adapters/config", "alpha / (rank**0.5 if self.use_rslora else rank)", "alpha / rank", "adapters/test_targets.py"),
    _fault("layers of different scalings share the first one", "adapters/bank", "if len(scalings) == 1:", "if scalings:", "adapters/test_bank.py"),
    _fault("merging leaves the scaling out", "storage/merge", "update = spec.scaling * (B @ A)", "update = B @ A", "storage/test_merge.py"),
    _fault("PEFT's alpha is the scaling", "peft/write", "    alpha = scaling * rank\n", "    alpha = scaling\n", "peft/test_peft.py"),
    _fault("PEFT's uniform adapter loses the scaling", "peft/write", "pad(specs[name].scaling * B, (0, missing))", "pad(B, (0, missing))", "storage/test_to_peft.py::test_a_uniform_adapter_has_one_rank_and_the_scaling_one"),
)  # fmt: skip
