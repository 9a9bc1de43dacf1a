//! The other end of the socket: a request goes out, the reply comes in. Used by `banctl`, blocking, one connection a request.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::protocol::{Reply, Request};

/// Why there is no reply.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens.
    #[error("band is not running: nobody listens on {0}; start it with: systemctl start band")]
    Absent(PathBuf),
    /// The socket may not be used.
    #[error("this user may not talk to band: {0} belongs to group band; use sudo, or join the group")]
    Forbidden(PathBuf),
    /// The connection broke.
    #[error("the connection to band broke: {0}")]
    Broken(#[from] io::Error),
    /// The answer makes no sense.
    #[error("band's answer was not understood ({0}); are band and banctl of the same version?")]
    Garbled(String),
}

/// A connection to the daemon.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<UnixStream>,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// `Absent` or `Forbidden`, by what the system said.
    pub fn connect(socket: &Path) -> Result<Self, Error> {
        let stream = UnixStream::connect(socket).map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => Error::Forbidden(socket.to_owned()),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Error::Absent(socket.to_owned()),
            _ => Error::Broken(error),
        })?;
        Ok(Self { reader: BufReader::new(stream) })
    }

    /// Asks, and waits for the reply.
    ///
    /// # Errors
    /// When the connection breaks or the answer is no reply.
    pub fn ask(&mut self, request: &Request) -> Result<Reply, Error> {
        let mut line = serde_json::to_vec(request).map_err(|error| Error::Garbled(error.to_string()))?;
        line.push(b'\n');
        self.reader.get_mut().write_all(&line)?;
        match self.next_line()? {
            Some(line) => serde_json::from_str(&line).map_err(|error| Error::Garbled(error.to_string())),
            None => Err(Error::Broken(io::Error::new(io::ErrorKind::UnexpectedEof, "it was closed without an answer"))),
        }
    }

    /// The next line of a stream; `None` when the daemon is gone.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn next_line(&mut self) -> Result<Option<String>, Error> {
        let mut line = String::new();
        let read = self.reader.read_line(&mut line)?;
        Ok((read > 0).then_some(line))
    }
}
