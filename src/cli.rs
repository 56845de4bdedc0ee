//! Turns a command line into a call and an exit code.

pub mod inspect;
pub mod models;
pub mod progress;
pub mod pull;

use crate::config::hub_env;
use crate::weights::hub::{Hub, HubConfig, HubError};

/// The hub as the environment describes it.
pub fn hub_from_environment() -> Result<Hub, HubError> {
    let environment = hub_env::hub_environment();
    Hub::new(HubConfig {
        cache_dir: environment.cache_dir,
        endpoint: environment.endpoint,
        token: environment.token,
        offline: environment.offline,
        proxy: environment.proxy,
    })
}
