//! Which experts a token goes to, and the sum of what they make of it.
//!
//! ```text
//!   p      = softmax(logits);  chosen = the largest p, weights = p or p / (sum of the chosen)
//!   out[t] = sum over the chosen experts e of t, in ascending order: weight(t, e) * y_e[t]
//! ```
//!
//! On the CPU each expert multiplies the rows of its tokens by itself. On a card the routes stay
//! there, and all experts multiply in one launch, whose shape does not depend on them.

mod gpu;

use std::borrow::Cow;

use candle_core::{Result, bail};

use super::gather_columns::gather_columns;
use super::gather_rows::gather_rows;
use super::indices::Indices;
use super::matmul::{Weights, gated_matmul, matmul};
use super::rows::for_each_row_mut;
use super::tensor::{Device, Tensor};
pub use gpu::{MAX_CHOSEN, max_group_rows};

/// The experts of each token of a batch.
#[derive(Clone, Debug)]
pub enum Routes {
    /// In the program's memory.
    Cpu(CpuRoutes),
    /// In a card's memory.
    Gpu(gpu::GpuRoutes),
}

/// Rows of activations, each for one expert.
#[derive(Clone, Debug)]
pub enum ExpertRows {
    /// A matrix for each expert that has tokens.
    Cpu(Vec<Option<Tensor>>),
    /// One matrix on a card.
    Gpu(gpu::GpuRows),
}

/// What one expert multiplies with.
#[derive(Clone, Copy)]
pub struct ExpertWeights<'a> {
    /// The matrix; on a card those of all experts lie side by side.
    pub weights: &'a Weights,
    /// The column of the input that each column of the matrix is for, if not the same.
    pub column_order: Option<&'a Indices>,
}

/// The experts of each token, in the program's memory.
#[derive(Clone, Debug, PartialEq)]
pub struct CpuRoutes {
    /// `[num_tokens, num_chosen]`, of each token in ascending order of experts.
    choices: Vec<Choice>,
    num_chosen: usize,
    num_experts: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Choice {
    expert: usize,
    weight: f32,
}

impl Routes {
    /// Chooses experts by logits `[num_tokens, num_experts]` in `f32`; of equal ones the first.
    /// `normalised` weights sum up to one.
    ///
    /// # Errors
    /// If there are fewer experts than are to be chosen, or a card cannot choose so many.
    pub fn choose(logits: &Tensor, num_chosen: usize, normalised: bool) -> Result<Self> {
        let (_, num_experts) = logits.dims2()?;
        if num_chosen == 0 || num_experts < num_chosen {
            bail!("{num_chosen} of {num_experts} experts cannot be chosen");
        }
        Ok(match logits {
            Tensor::Cpu(_) => Self::Cpu(CpuRoutes::choose(logits, num_chosen, normalised)?),
            Tensor::Gpu(logits) => Self::Gpu(gpu::choose(logits, num_chosen, normalised)?),
        })
    }

    /// The rows of `x` `[num_tokens, num_cols]` that each expert gets.
    ///
    /// # Errors
    /// If there are other tokens than were chosen for.
    pub fn spread(&self, x: &Tensor) -> Result<ExpertRows> {
        match self {
            Self::Cpu(routes) => {
                let rows = |tokens: Indices| {
                    let is_used = !tokens.is_empty();
                    is_used.then(|| gather_rows(x, &tokens)).transpose()
                };
                Ok(ExpertRows::Cpu(
                    routes.tokens_by_expert().into_iter().map(rows).collect::<Result<_>>()?,
                ))
            }
            Self::Gpu(routes) => routes.spread(x.gpu()?).map(ExpertRows::Gpu),
        }
    }

    /// The weighted sum of what the experts made of the rows that [`Routes::spread`] gave them:
    /// `[num_tokens, num_cols]`.
    ///
    /// # Errors
    /// If rows are missing.
    pub fn combine(&self, made: &ExpertRows, num_cols: usize) -> Result<Tensor> {
        match (self, made) {
            (Self::Cpu(routes), ExpertRows::Cpu(made)) => routes.combine(made, num_cols),
            (Self::Gpu(routes), ExpertRows::Gpu(made)) => routes.combine(made).map(Tensor::Gpu),
            _ => bail!("routes and rows are on different devices"),
        }
    }
}

impl ExpertRows {
    /// Each row times the matrix of its expert.
    ///
    /// # Errors
    /// As [`matmul`].
    pub fn matmul(&self, experts: &[ExpertWeights<'_>]) -> Result<Self> {
        match self {
            Self::Cpu(rows) => {
                each_expert(rows, experts, |x, weights| matmul(x, weights, None)).map(Self::Cpu)
            }
            Self::Gpu(rows) => rows.matmul(experts[0].weights.gpu()?).map(Self::Gpu),
        }
    }

    /// `silu(gate(x)) * up(x)` of each row with the matrices of its expert.
    ///
    /// # Errors
    /// As [`gated_matmul`].
    pub fn gated_matmul(&self, experts: &[ExpertWeights<'_>]) -> Result<Self> {
        match self {
            Self::Cpu(rows) => each_expert(rows, experts, gated_matmul).map(Self::Cpu),
            Self::Gpu(rows) => rows.gated_matmul(experts[0].weights.gpu()?).map(Self::Gpu),
        }
    }
}

fn each_expert(
    rows: &[Option<Tensor>],
    experts: &[ExpertWeights<'_>],
    multiply: impl Fn(&Tensor, &Weights) -> Result<Tensor>,
) -> Result<Vec<Option<Tensor>>> {
    let product = |(rows, expert): (&Option<Tensor>, &ExpertWeights<'_>)| {
        let Some(rows) = rows else { return Ok(None) };
        let rows = match expert.column_order {
            None => Cow::Borrowed(rows),
            Some(order) => Cow::Owned(gather_columns(rows, order)?),
        };
        multiply(&rows, expert.weights).map(Some)
    };
    rows.iter().zip(experts).map(product).collect()
}

impl CpuRoutes {
    fn choose(logits: &Tensor, num_chosen: usize, normalised: bool) -> Result<Self> {
        let (_, num_experts) = logits.dims2()?;
        let rows = logits.to_vec()?;
        let choose = |row| chosen(row, num_chosen, normalised);
        let choices = rows.chunks_exact(num_experts).flat_map(choose).collect();
        Ok(Self { choices, num_chosen, num_experts })
    }

    /// The tokens of each expert, in ascending order.
    fn tokens_by_expert(&self) -> Vec<Indices> {
        let mut tokens = vec![Vec::new(); self.num_experts];
        for (i, choice) in self.choices.iter().enumerate() {
            tokens[choice.expert].push((i / self.num_chosen) as u32);
        }
        tokens.into_iter().map(Indices::from).collect()
    }

    fn combine(&self, outputs: &[Option<Tensor>], num_cols: usize) -> Result<Tensor> {
        let sources = self.sources();
        let mut num_rows = vec![0; self.num_experts];
        self.choices.iter().for_each(|choice| num_rows[choice.expert] += 1);
        let mut rows = Vec::with_capacity(self.num_experts);
        for (expert, num_rows) in num_rows.into_iter().enumerate() {
            let output = outputs.get(expert).and_then(Option::as_ref);
            let found = output.map_or(Ok((0, num_cols)), Tensor::dims2)?;
            if found != (num_rows, num_cols) {
                bail!("expert {expert} made {found:?}, not {:?}", (num_rows, num_cols));
            }
            rows.push(output.map(Tensor::to_vec).transpose()?.unwrap_or_default());
        }
        let num_tokens = self.choices.len() / self.num_chosen;
        let mut out = vec![0.0_f32; num_tokens * num_cols];
        for_each_row_mut(&mut out, num_cols, |token, out| {
            let first = token * self.num_chosen;
            let choices = self.choices[first..].iter().zip(&sources[first..]);
            for (choice, row) in choices.take(self.num_chosen) {
                let made = &rows[choice.expert][row * num_cols..][..num_cols];
                for (out, made) in out.iter_mut().zip(made) {
                    *out += choice.weight * made;
                }
            }
        });
        Tensor::from_vec(out, (num_tokens, num_cols), &Device::Cpu)
    }

    /// The row of each choice among its expert's.
    fn sources(&self) -> Vec<usize> {
        let mut next = vec![0; self.num_experts];
        let source = |choice: &Choice| {
            next[choice.expert] += 1;
            next[choice.expert] - 1
        };
        self.choices.iter().map(source).collect()
    }
}

/// The choices of one token.
fn chosen(logits: &[f32], num_chosen: usize, normalised: bool) -> Vec<Choice> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    let max = logits[order[0]];
    let weight = |&logit: &f32| (logit - max).exp();
    order.truncate(num_chosen);
    order.sort_unstable();
    let total: f32 = if normalised {
        order.iter().map(|&expert| weight(&logits[expert])).sum()
    } else {
        logits.iter().map(weight).sum()
    };
    let choice = |expert: usize| Choice { expert, weight: weight(&logits[expert]) / total };
    order.into_iter().map(choice).collect()
}

/// `x + sigmoid(gate) * y`, row by row: `x` and `y` `[num_tokens, num_cols]`, `gate`
/// `[num_tokens, 1]`.
///
/// # Errors
/// If shapes do not fit.
pub fn add_gated(x: &Tensor, gate: &Tensor, y: &Tensor) -> Result<Tensor> {
    let shape @ (num_tokens, num_cols) = x.dims2()?;
    if y.dims2()? != shape || gate.dims2()? != (num_tokens, 1) {
        bail!("{shape:?} and {:?} with gates of {:?}", y.dims2()?, gate.dims2()?);
    }
    if let Tensor::Gpu(x) = x {
        return gpu::add_gated(x, gate.gpu()?, y.gpu()?).map(Tensor::Gpu);
    }
    let (mut out, gates, y) = (x.to_vec()?, gate.to_vec()?, y.to_vec()?);
    for_each_row_mut(&mut out, num_cols, |token, out| {
        let gate = 1.0 / (1.0 + (-gates[token]).exp());
        for (out, y) in out.iter_mut().zip(&y[token * num_cols..]) {
            *out += gate * y;
        }
    });
    Tensor::from_vec(out, shape, &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(values: &[f32], num_cols: usize) -> Tensor {
        Tensor::from_vec(values.to_vec(), (values.len() / num_cols, num_cols), &Device::Cpu)
            .unwrap()
    }

    #[test]
    fn the_most_likely_experts_are_chosen_with_their_shares() {
        // Probabilities 1/10, 2/10, 3/10, 4/10, and in another order.
        let logits: Vec<f32> = [1.0, 2.0, 3.0, 4.0, 3.0, 4.0, 1.0, 2.0].map(f32::ln).to_vec();
        for (normalised, expected) in [
            (false, [(2, 0.3), (3, 0.4), (0, 0.3), (1, 0.4)]),
            (true, [(2, 3.0 / 7.0), (3, 4.0 / 7.0), (0, 3.0 / 7.0), (1, 4.0 / 7.0)]),
        ] {
            let routes = CpuRoutes::choose(&tensor(&logits, 4), 2, normalised).unwrap();
            for (choice, (expert, weight)) in routes.choices.iter().zip(expected) {
                assert_eq!(choice.expert, expert);
                assert!((choice.weight - weight).abs() < 1e-6, "{choice:?}, not {weight}");
            }
            let tokens: Vec<_> = routes.tokens_by_expert().iter().map(|t| t.to_vec()).collect();
            assert_eq!(tokens, [[1], [1], [0], [0]]);
        }
    }

    #[test]
    fn of_equal_logits_the_first_are_chosen_and_extremes_stay_finite() {
        let experts = |logits: &[f32]| {
            let routes = CpuRoutes::choose(&tensor(logits, logits.len()), 2, true).unwrap();
            assert!(routes.choices.iter().all(|choice| choice.weight.is_finite()));
            routes.choices.iter().map(|choice| choice.expert).collect::<Vec<_>>()
        };
        assert_eq!(experts(&[1.0, 1.0, 1.0]), [0, 1]);
        assert_eq!(experts(&[0.0, 1e30, -1e30, 1e30]), [1, 3]);
        assert!(Routes::choose(&tensor(&[1.0], 1), 2, true).is_err());
    }

    #[test]
    fn outputs_are_added_by_weight_in_the_order_of_experts() {
        let logits: Vec<f32> = [1.0, 3.0, 0.0, 3.0, 1.0, 0.0].map(f32::ln).to_vec();
        let routes = CpuRoutes::choose(&tensor(&logits, 3), 2, true).unwrap();
        let outputs = [Some(tensor(&[4.0, 8.0, 12.0, 16.0], 2)), Some(tensor(&[1.0; 4], 2)), None];
        let out = routes.combine(&outputs, 2).unwrap().to_vec().unwrap();
        let expected = [0.25 * 4.0 + 0.75, 0.25 * 8.0 + 0.75, 0.75 * 12.0 + 0.25, 12.25];
        for (out, expected) in out.iter().zip(expected) {
            assert!((out - expected).abs() < 1e-5, "{out}, not {expected}");
        }
        assert!(routes.combine(&outputs[..1], 2).is_err(), "an expert has tokens and no rows");
        let extra = [outputs[0].clone(), outputs[1].clone(), Some(tensor(&[1.0; 2], 2))];
        assert!(routes.combine(&extra, 2).is_err(), "an expert has rows and no tokens");
    }

    #[test]
    fn a_gate_opens_by_the_sigmoid() {
        let (x, y) = (tensor(&[1.0, 2.0, 3.0, 4.0], 2), tensor(&[10.0, 20.0, 30.0, 40.0], 2));
        let out = add_gated(&x, &tensor(&[0.0, -200.0], 1), &y).unwrap();
        assert_eq!(out.to_vec().unwrap(), [6.0, 12.0, 3.0, 4.0]);
        assert!(add_gated(&x, &tensor(&[0.0], 1), &y).is_err());
    }
}
