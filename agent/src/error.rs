//! What a request can be answered with when it fails.

use std::io;

use serde::{Deserialize, Serialize};
use ttrpc::Code;

/// Why a request was not done; the variant decides the ttrpc status code, the text is for a person.
#[derive(Debug, thiserror::Error, Serialize, Deserialize)]
pub enum Error {
    /// NOT_FOUND: a container, process or program that is not there.
    #[error("{0}")]
    NotFound(String),
    /// ALREADY_EXISTS: an id in use.
    #[error("{0}")]
    AlreadyExists(String),
    /// INVALID_ARGUMENT: the request itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// PERMISSION_DENIED: a program that may not be executed.
    #[error("{0}")]
    Denied(String),
    /// FAILED_PRECONDITION: right in another state.
    #[error("{0}")]
    State(String),
    /// INTERNAL: the guest failed.
    #[error("{0}")]
    Internal(String),
}

impl Error {
    /// An I/O error with what was tried: "mount /proc: No such device (os error 19)".
    pub fn io(what: impl std::fmt::Display, error: io::Error) -> Self {
        Self::Internal(format!("{what}: {error}"))
    }

    /// The status code of the ttrpc reply.
    pub fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NOT_FOUND,
            Self::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Self::Invalid(_) => Code::INVALID_ARGUMENT,
            Self::Denied(_) => Code::PERMISSION_DENIED,
            Self::State(_) => Code::FAILED_PRECONDITION,
            Self::Internal(_) => Code::INTERNAL,
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), error.to_string()))
    }
}
