//! Adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): low-rank terms that some tokens of a batch have
//! beside a layer's projections. Tokens of several adapters and of none share a batch.

use std::sync::Arc;

use candle_core::Result;

pub use crate::ops::low_rank::{LowRank, LowRankSource};
pub use crate::ops::matmul::MatrixSource;

use crate::ops::indices::Indices;
use crate::ops::low_rank::add_low_rank;
use crate::ops::silu_mul::GateUpOrder;
use crate::ops::tensor::Tensor;

/// The projections of a layer, stacked as its inputs are shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Site {
    /// Queries, keys and values.
    Qkv,
    /// Behind the attention.
    Output,
    /// Both halves of the gated product.
    GateUp,
    /// Behind it.
    Down,
}

/// How many sites a layer has.
const NUM_SITES: usize = 4;

/// Of one layer the terms at each [`Site`].
pub type LayerTerms = [Vec<LowRank>; NUM_SITES];

/// An adapter's weights, made for one model.
pub struct LoraWeights {
    layers: Vec<LayerTerms>,
}

impl LoraWeights {
    /// The terms of every layer.
    pub fn new(layers: Vec<LayerTerms>) -> Self {
        Self { layers }
    }

    /// Memory that they take.
    pub fn num_bytes(&self) -> usize {
        self.layers.iter().flatten().flatten().map(LowRank::num_bytes).sum()
    }
}

impl std::fmt::Debug for LoraWeights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LoraWeights({} layers)", self.layers.len())
    }
}

/// The tokens of a batch that have one adapter.
#[derive(Clone, Debug)]
pub struct AdaptedRows {
    /// The tokens, ascending.
    pub rows: Indices,
    /// What they have.
    pub weights: Arc<LoraWeights>,
}

/// The adapters of a batch, seen from one layer.
#[derive(Clone, Copy)]
pub struct Adaptation<'a> {
    adapted: &'a [AdaptedRows],
    layer: usize,
}

impl<'a> Adaptation<'a> {
    /// Of tokens that have none.
    pub const NONE: Adaptation<'static> = Adaptation { adapted: &[], layer: 0 };

    /// Each adapter at most once.
    pub fn new(adapted: &'a [AdaptedRows], layer: usize) -> Self {
        Self { adapted, layer }
    }

    /// Whether no token has terms at a site.
    pub fn is_none(self, site: Site) -> bool {
        self.terms(site).next().is_none()
    }

    /// Adds to `y`, the product of `x` with the model's weights at a site, what adapters add there.
    /// `order` is that of `y`'s columns: but for [`Site::GateUp`] they are one below the other.
    ///
    /// # Errors
    /// If an adapter was made for another model.
    pub fn add(self, site: Site, (y, order): (&Tensor, GateUpOrder), x: &Tensor) -> Result<()> {
        self.terms(site).try_for_each(|(rows, terms)| add_low_rank((y, order), x, rows, terms))
    }

    fn terms(self, site: Site) -> impl Iterator<Item = (&'a Indices, &'a [LowRank])> {
        let of_adapter = move |adapted: &'a AdaptedRows| {
            let terms = adapted.weights.layers.get(self.layer)?[site as usize].as_slice();
            (!terms.is_empty()).then_some((&adapted.rows, terms))
        };
        self.adapted.iter().filter_map(of_adapter)
    }
}
