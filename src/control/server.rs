//! Listens on the socket: connections come in, requests go to the daemon, its replies go back. Decides nothing itself.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;

use super::protocol::{REQUEST_BYTES_MAX, Reply, Request, read_request};

/// Connections served at once; a further one waits.
const CONNECTIONS_MAX: usize = 512;
/// Who asks nothing for so long makes room for others.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// How long to wait before the next connection is taken when the system has refused one.
const RETRY: Duration = Duration::from_millis(100);
/// Events a watcher may lag behind before some are left out for it.
pub const WATCH_QUEUE: usize = 4096;

/// Why nobody can be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another daemon is there.
    #[error(
        "another band is already listening on {0}; stop it first, or give this one a socket of its own ([paths] socket)"
    )]
    Taken(PathBuf),
    /// Something that is no socket is in the way.
    #[error("{0} is in the way and no socket; move it, or choose another [paths] socket")]
    InTheWay(PathBuf),
    /// The system refuses.
    #[error("cannot listen on {0}: {1}")]
    Refused(PathBuf, io::Error),
}

/// A question with a place for the answer.
#[derive(Debug)]
pub struct Asked {
    /// What is asked.
    pub request: Request,
    /// Where the answer goes.
    pub answer: oneshot::Sender<Answer>,
}

/// An answer, or many.
#[derive(Debug)]
pub enum Answer {
    /// One.
    Reply(Reply),
    /// Lines as they come, until the asker leaves.
    Stream(mpsc::Receiver<Arc<str>>),
}

/// Takes the socket's place; a stale one of a dead daemon is replaced, a live one is respected.
///
/// # Errors
/// As `Error` says.
pub fn bind(path: &Path) -> Result<std::os::unix::net::UnixListener, Error> {
    let refused = |error| Error::Refused(path.to_owned(), error);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(refused)?;
    }
    if let Ok(there) = fs::symlink_metadata(path) {
        if !there.file_type().is_socket() {
            return Err(Error::InTheWay(path.to_owned()));
        }
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(Error::Taken(path.to_owned()));
        }
        fs::remove_file(path).map_err(refused)?;
    }
    let listener = std::os::unix::net::UnixListener::bind(path).map_err(refused)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o660)).map_err(refused)?;
    if let Some(group) = group_id("band") {
        // Without the right to give it away the socket stays with our own group; root and we can still use it.
        let _ = std::os::unix::fs::chown(path, None, Some(group));
    }
    listener.set_nonblocking(true).map_err(refused)?;
    Ok(listener)
}

fn group_id(name: &str) -> Option<u32> {
    let groups = fs::read_to_string("/etc/group").ok()?;
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)).flatten()?.parse().ok()
    })
}

/// Serves until the daemon stops listening to `asked`.
pub async fn serve(listener: UnixListener, asked: mpsc::Sender<Asked>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection to the control socket could not be taken");
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        let asked = asked.clone();
        tokio::spawn(async move {
            if let Err(error) = converse(stream, &asked).await {
                tracing::debug!(%error, "a connection to the control socket broke");
            }
            drop(place);
        });
    }
}

/// Only root, the daemon's own user, and members of the socket's group get this far; who it is, is checked again here.
fn may_ask(stream: &UnixStream) -> Result<(), String> {
    let peer = stream.peer_cred().map_err(|error| format!("who is asking is not known: {error}"))?;
    let own = rustix::process::getuid().as_raw();
    let group = group_id("band");
    if peer.uid() == 0 || peer.uid() == own || Some(peer.gid()) == group || in_group(peer.uid(), "band") {
        return Ok(());
    }
    Err(format!("user {} may not talk to band; use sudo, or join group band", peer.uid()))
}

fn in_group(uid: u32, group: &str) -> bool {
    let name = |text: String| {
        text.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            (fields.get(2).and_then(|id| id.parse::<u32>().ok()) == Some(uid)).then(|| fields[0].to_owned())
        })
    };
    let Some(user) = fs::read_to_string("/etc/passwd").ok().and_then(name) else { return false };
    fs::read_to_string("/etc/group").is_ok_and(|groups| {
        groups
            .lines()
            .filter(|line| line.split(':').next() == Some(group))
            .any(|line| line.rsplit(':').next().is_some_and(|members| members.split(',').any(|member| member == user)))
    })
}

async fn converse(stream: UnixStream, asked: &mpsc::Sender<Asked>) -> io::Result<()> {
    let allowed = may_ask(&stream);
    let (read, mut write) = stream.into_split();
    if let Err(why) = allowed {
        return write.write_all(&Reply::failed(1, why).line()).await;
    }
    let mut read = BufReader::new(read);
    let mut line = Vec::new();
    loop {
        line.clear();
        let limit = REQUEST_BYTES_MAX as u64 + 1;
        let mut limited = (&mut read).take(limit);
        let Ok(length) = timeout(SILENCE_MAX, limited.read_until(b'\n', &mut line)).await else { return Ok(()) };
        if length? == 0 {
            return Ok(());
        }
        if line.last() != Some(&b'\n') && line.len() > REQUEST_BYTES_MAX {
            let reply = Reply::failed(1, format!("the request is longer than {REQUEST_BYTES_MAX} bytes; split it"));
            return write.write_all(&reply.line()).await;
        }
        let request = match read_request(&line) {
            Ok(request) => request,
            Err(why) => {
                write.write_all(&Reply::failed(2, why).line()).await?;
                continue;
            }
        };
        let (answer, receive) = oneshot::channel();
        if asked.send(Asked { request, answer }).await.is_err() {
            return write.write_all(&Reply::failed(69, "band is stopping").line()).await;
        }
        match receive.await {
            Ok(Answer::Reply(reply)) => write.write_all(&reply.line()).await?,
            Ok(Answer::Stream(lines)) => return stream_lines(lines, read, write).await,
            Err(_) => write.write_all(&Reply::failed(69, "band is stopping").line()).await?,
        }
    }
}

async fn stream_lines(
    mut lines: mpsc::Receiver<Arc<str>>,
    mut read: BufReader<tokio::net::unix::OwnedReadHalf>,
    mut write: tokio::net::unix::OwnedWriteHalf,
) -> io::Result<()> {
    write.write_all(&Reply::data(serde_json::Value::Null).line()).await?;
    let mut byte = [0u8; 1];
    loop {
        tokio::select! {
            line = lines.recv() => match line {
                Some(line) => {
                    write.write_all(line.as_bytes()).await?;
                    write.write_all(b"\n").await?;
                }
                None => return Ok(()),
            },
            // The asker says nothing more; when the connection ends, so does the stream.
            read = read.read(&mut byte) => if read? == 0 { return Ok(()) },
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    #[test]
    fn a_live_socket_is_respected_and_a_stale_one_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/band.sock");
        let first = bind(&path).unwrap();
        assert!(matches!(bind(&path), Err(Error::Taken(_))));
        drop(first);
        assert!(bind(&path).is_ok());
        let file = directory.path().join("file");
        fs::write(&file, "precious").unwrap();
        assert!(matches!(bind(&file), Err(Error::InTheWay(_))));
        assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    }
}
