//! What is said over the socket: one JSON object a line each way. Requests come in, replies go out; both are plain values.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A request may have at most so many bytes; `banctl` splits longer lists.
pub const REQUEST_BYTES_MAX: usize = 256 * 1024;

/// What `banctl` asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Is this machine protected?
    Status,
    /// Bans in force.
    List {
        /// Only of this jail.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        jail: Option<String>,
        /// Only those that this address or network touches.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        net: Option<String>,
    },
    /// Ban by hand.
    Ban {
        /// Addresses or networks.
        nets: Vec<String>,
        /// The jail; `manual` if none is named.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        jail: Option<String>,
        /// How long: a duration, `forever`, or the jail's bantime.
        #[serde(default, rename = "for", skip_serializing_if = "Option::is_none")]
        span: Option<String>,
        /// Why, for people.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    /// Let in again.
    Unban {
        /// Addresses or networks.
        #[serde(default)]
        nets: Vec<String>,
        /// Everybody.
        #[serde(default)]
        all: bool,
        /// Only from this jail.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        jail: Option<String>,
    },
    /// The evidence against an address.
    Why {
        /// The address or network.
        net: String,
    },
    /// Put a network on the allowlist.
    AllowAdd {
        /// The network.
        net: String,
        /// For how long; forever if left out.
        #[serde(default, rename = "for", skip_serializing_if = "Option::is_none")]
        span: Option<String>,
        /// Why, for people.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        note: Option<String>,
    },
    /// Take a network off the allowlist.
    AllowRemove {
        /// The network.
        net: String,
    },
    /// The allowlist.
    AllowList,
    /// Read the configuration anew.
    Reload,
    /// Events as they happen, until the connection is closed.
    Watch,
    /// The jails with their policies.
    JailList,
    /// The rules in the kernel as text.
    Rules,
}

/// What the daemon answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// It was done.
    pub ok: bool,
    /// What to tell people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// The exit code, if it was not done.
    #[serde(default)]
    pub code: u8,
    /// The answer itself.
    #[serde(default)]
    pub data: Value,
}

impl Reply {
    /// Done, with an answer.
    pub fn data(data: Value) -> Self {
        Self { ok: true, message: String::new(), code: 0, data }
    }

    /// Done, with something to say.
    pub fn done(message: impl Into<String>, data: Value) -> Self {
        Self { ok: true, message: message.into(), code: 0, data }
    }

    /// Not done.
    pub fn failed(code: u8, message: impl Into<String>) -> Self {
        Self { ok: false, message: message.into(), code, data: Value::Null }
    }

    /// As one line.
    pub fn line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self)
            .unwrap_or_else(|_| b"{\"ok\":false,\"message\":\"the answer could not be written\"}".to_vec());
        line.push(b'\n');
        line
    }
}

/// Reads a request.
///
/// # Errors
/// A sentence on what is wrong with it.
pub fn read_request(line: &[u8]) -> Result<Request, String> {
    serde_json::from_slice(line).map_err(|error| format!("not a request: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_as_they_are_written_and_garbage_is_named() {
        let request =
            Request::Ban { nets: vec!["192.0.2.1".into()], jail: None, span: Some("1h".into()), reason: None };
        let line = serde_json::to_vec(&request).unwrap_or_default();
        assert_eq!(String::from_utf8_lossy(&line), r#"{"command":"ban","nets":["192.0.2.1"],"for":"1h"}"#);
        assert_eq!(read_request(&line), Ok(request));
        assert_eq!(read_request(br#"{"command":"status"}"#), Ok(Request::Status));
        for wrong in [
            "",
            "{}",
            "\0\u{1}",
            r#"{"command":"explode"}"#,
            r#"{"command":"ban"}"#,
            r#"{"command":"why","net":"1","x":2}"#,
        ] {
            assert!(read_request(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }
}
