//! Flattens a scheduler's decision into the tensors' index vectors. Pure.

use std::sync::Arc;

use crate::models::ForwardBatch;
use crate::models::lora::{AdaptedRows, LoraWeights};
use crate::ops::indices::Indices;
use crate::ops::paged_attention::AttentionMetadata;
use crate::scheduler::step::{Adapter, ScheduledSeq, SchedulerOutput};

/// Lays the scheduled tokens of all sequences one after another.
///
/// Logits are wanted for every token of a sequence that scores its prompt, and of a sequence that
/// samples for its last token and the guesses behind it. Behind those rows come the ones that are
/// pooled.
pub fn forward_batch(step: &SchedulerOutput, block_size: usize) -> ForwardBatch {
    let scheduled = &step.scheduled;
    let max_blocks = scheduled.iter().map(|seq| seq.blocks.blocks().len()).max().unwrap_or(0);
    let mut batch = ForwardBatch {
        input_ids: Indices::default(),
        logits_indices: Indices::default(),
        attention: AttentionMetadata {
            query_start_loc: vec![0].into(),
            max_blocks_per_seq: max_blocks,
            ..AttentionMetadata::default()
        },
        adapted: adapted_rows(scheduled),
    };
    let mut pooled_rows = Vec::new();
    for seq in scheduled {
        let first_row = batch.input_ids.len();
        let pooled = seq.pool.iter().flat_map(|pool| pool.rows.clone());
        pooled_rows.extend(pooled.map(|row| (first_row + row) as u32));
        batch.input_ids.extend(&seq.tokens);
        batch.logits_indices.extend(logits_rows(seq).map(|row| (first_row + row) as u32));
        push_attention(&mut batch.attention, seq, block_size);
    }
    batch.logits_indices.extend(pooled_rows);
    batch
}

/// Which of a sequence's scheduled tokens need logits, counted from its first.
pub fn logits_rows(seq: &ScheduledSeq) -> impl Iterator<Item = usize> + use<> {
    let scored = seq.prompt_logprobs.as_ref().map_or(0, |wanted| wanted.targets.len());
    // Whoever's token is only being drawn may draw another one.
    let is_sampled = seq.sample.is_some() || seq.drawn_by.is_some();
    let sampled = if is_sampled { seq.num_known() - 1..seq.tokens.len() } else { 0..0 };
    (0..scored).chain(sampled.filter(move |&row| scored <= row))
}

/// The tokens of each adapter, however many sequences have it.
fn adapted_rows(scheduled: &[ScheduledSeq]) -> Vec<AdaptedRows> {
    let mut adapted: Vec<(&Adapter, AdaptedRows)> = Vec::new();
    let mut first_row = 0;
    for seq in scheduled {
        let rows = first_row..first_row + seq.tokens.len() as u32;
        first_row = rows.end;
        let Some(adapter) = &seq.adapter else { continue };
        if let Some((_, known)) = adapted.iter_mut().find(|(known, _)| known.id() == adapter.id()) {
            known.rows.extend(rows);
            continue;
        }
        let weights: Arc<LoraWeights> =
            adapter.weights().expect("adapters are loaded for the runner that they are given to");
        adapted.push((adapter, AdaptedRows { rows: rows.collect(), weights }));
    }
    adapted.into_iter().map(|(_, rows)| rows).collect()
}

fn push_attention(attention: &mut AttentionMetadata, seq: &ScheduledSeq, block_size: usize) {
    let blocks = seq.blocks.blocks();
    let table_end = attention.block_table.len() + attention.max_blocks_per_seq;
    attention.block_table.extend(blocks.iter().map(|block| block.0));
    attention.block_table.resize(table_end, 0);
    for position in seq.start..seq.end() {
        attention.positions.push((seq.rope_start + position) as u32);
        attention.slot_mapping.push(seq.blocks.slot(position, block_size) as u32);
    }
    attention.query_start_loc.push(attention.positions.len() as u32);
    attention.seq_lens.push(seq.end() as u32);
    attention.max_query_len = attention.max_query_len.max(seq.tokens.len() as u32);
    attention.max_seq_len = attention.max_seq_len.max(seq.end() as u32);
}
