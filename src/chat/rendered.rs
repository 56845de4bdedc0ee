//! What a request becomes, shown instead of run.

use crate::chat::model::ServedModel;
use crate::chat::prompt::Prepared;
use crate::openai::generation::{GenerationFields, Stop};
use crate::openai::render::{RenderedRequest, RenderedSampling};

impl Prepared {
    /// The prompt as the model would read it, and how it would be answered.
    pub fn rendered(&self, fields: &GenerationFields, model: &ServedModel) -> RenderedRequest {
        let request = &self.request;
        RenderedRequest {
            request_id: request.id.to_string(),
            model: model.name.clone(),
            prompt: model.decode_all(&request.prompt),
            token_ids: request.prompt.to_vec(),
            features: None,
            sampling_params: self.rendered_sampling(fields),
            stream: fields.stream == Some(true),
            cache_salt: fields.cache_salt.clone(),
            priority: fields.priority.unwrap_or(0),
        }
    }

    fn rendered_sampling(&self, fields: &GenerationFields) -> RenderedSampling {
        let params = &self.request.params;
        let bias = params.logit_bias.iter().copied();
        RenderedSampling {
            n: self.request.n,
            temperature: params.temperature,
            top_p: params.top_p,
            top_k: params.top_k.map_or(0, u32::from),
            min_p: params.min_p,
            repetition_penalty: params.repetition_penalty,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            seed: fields.seed,
            stop: match &fields.stop {
                None | Some(Stop::Tokens(_) | Stop::TokenLists(_)) => Vec::new(),
                Some(Stop::One(string)) => vec![string.clone()],
                Some(Stop::Many(strings)) => strings.clone(),
            },
            stop_token_ids: self.request.stop.stop_token_ids.to_vec(),
            ignore_eos: fields.ignore_eos == Some(true),
            max_tokens: self.request.stop.max_tokens,
            min_tokens: params.min_tokens,
            logprobs: params.logprobs,
            prompt_logprobs: params.prompt_logprobs,
            logit_bias: (!params.logit_bias.is_empty()).then(|| bias.collect()),
            skip_special_tokens: fields.skip_special_tokens != Some(false),
            include_stop_str_in_output: fields.include_stop_str_in_output == Some(true),
        }
    }
}
