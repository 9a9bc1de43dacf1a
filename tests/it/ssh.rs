//! A real sshd, attacked with the real ssh client over a cable: shut out after so many wrong passwords, on every connection.
//!
//! sshd runs in a mount namespace with users and a `/dev/log` of its own; this test reads that socket and writes what comes
//! into a file, as a syslog daemon does. Root is needed for that, not only in a user namespace.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::house::{House, Running, SOON, kernel_bans};
use crate::netns::{Lab, readable, run, wait_until};

/// "right", hashed for crypt(3).
const SHADOW: &str = "alice:HASH:19000:0:99999:7:::\nroot:*:19000:0:99999:7:::\nsshd:*:19000:0:99999:7:::\n";
const USERS: &str =
    "root:x:0:0:root:/:/bin/sh\nsshd:x:65533:65534::/run/sshd:/bin/false\nalice:x:65532:65534::/tmp:/bin/sh\n";

/// Makes the namespace's private files and becomes sshd.
const SCRIPT: &str = "set -e
for name in null zero random urandom tty; do touch $HOUSE/dev/$name; mount --bind /dev/$name $HOUSE/dev/$name; done
mount --bind $HOUSE/dev /dev
mount --bind $HOUSE/passwd /etc/passwd
mount --bind $HOUSE/shadow /etc/shadow
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd
exec $SSHD -D -f $HOUSE/sshd_config";

/// Starts one in the namespace of this thread; its log goes to the house's `log/auth.log`.
fn sshd(house: &House) -> Running {
    let hash = run("openssl", "passwd -6 -salt band right");
    fs::write(house.path("passwd"), USERS).unwrap();
    fs::write(house.path("shadow"), SHADOW.replace("HASH", hash.trim())).unwrap();
    fs::create_dir(house.path("dev")).unwrap();
    for name in ["", "dev"] {
        fs::set_permissions(house.path(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut keygen = Command::new("ssh-keygen");
    keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(house.path("key"));
    assert!(keygen.status().expect("ssh-keygen (openssh-client) is needed by the tests").success());
    let config = "Port 22\nHostKey {dir}/key\nUsePAM no\nUseDNS no\nPidFile none\nStrictModes no\nPermitRootLogin no\n\
                  PasswordAuthentication yes\nKbdInteractiveAuthentication no\nPubkeyAuthentication no\n\
                  ClientAliveInterval 1\nClientAliveCountMax 2\n";
    fs::write(house.path("sshd_config"), house.fill(config)).unwrap();
    let syslog = UnixDatagram::bind(house.path("dev/log")).unwrap();
    fs::set_permissions(house.path("dev/log"), fs::Permissions::from_mode(0o666)).unwrap();
    let log = File::options().create(true).append(true).open(house.path("log/auth.log")).unwrap();
    std::thread::spawn(move || write_log(&syslog, log));
    let program = ["/usr/sbin/sshd", "/usr/bin/sshd", "/sbin/sshd"].into_iter().find(|path| Path::new(path).exists());
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", SCRIPT]);
    command.env("HOUSE", house.path("")).env("SSHD", program.expect("sshd (openssh-server) is needed by the tests"));
    Running(command.stdin(Stdio::null()).spawn().expect("unshare (util-linux) runs"))
}

/// Writes what comes as syslog writes it: `<38>Jun 21 16:47:48 sshd[1]: …` becomes `Jun 21 16:47:48 h sshd[1]: …`.
fn write_log(syslog: &UnixDatagram, mut log: File) {
    let mut buffer = [0; 8192];
    while let Ok(length) = syslog.recv(&mut buffer) {
        let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
        let rest = text.split_once('>').map_or(text.as_str(), |(_, rest)| rest);
        let (stamp, message) = rest.split_at(rest.len().min(15));
        let line = format!("{stamp} h{}\n", message.trim_end_matches(['\0', '\n']));
        if log.write_all(line.as_bytes()).is_err() {
            return;
        }
    }
}

/// The client, logging in as alice from one of the attacker's addresses.
fn ssh(from: &str, password: &str, command: &str) -> Command {
    let mut ssh = Command::new("sshpass");
    ssh.args(["-p", password, "ssh", "-F", "/dev/null", "-T", "-b", from]);
    for option in [
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        "PreferredAuthentications=password",
        "NumberOfPasswordPrompts=1",
        "ConnectTimeout=2",
        "ServerAliveInterval=1",
        "ServerAliveCountMax=2",
    ] {
        ssh.args(["-o", option]);
    }
    ssh.arg(format!("alice@{}", Lab::SERVER4)).arg(command);
    ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    ssh
}

#[test]
fn who_guesses_passwords_at_a_real_sshd_is_shut_out() {
    assert!(rustix::process::geteuid().is_root(), "a real sshd needs root");
    let lab = Lab::new();
    let [guesser, neighbour] = Lab::ATTACKER4;
    let house = lab.server.run(|| House::new("[jails.sshd]\nmaxretry = 3\nlogs = [\"{dir}/log/auth.log\"]\n"));
    let server_program = lab.server.run(|| sshd(&house));
    let server = SocketAddr::new(Lab::SERVER4.parse::<IpAddr>().unwrap(), 22);
    lab.attacker.run(|| {
        wait_until("sshd listens", SOON, || TcpStream::connect_timeout(&server, Duration::from_secs(1)).ok());
        // Somebody is logged in from the very address, and can work.
        let mut session =
            Running(ssh(guesser, "right", "cat").spawn().expect("sshpass and ssh are needed by the tests"));
        let mut typed = session.0.stdin.take().unwrap();
        let mut shown = BufReader::new(session.0.stdout.take().unwrap());
        typed.write_all(b"hello\n").unwrap();
        assert!(readable(shown.get_ref(), SOON), "the session answers; {}", house.stderr());
        let mut line = String::new();
        shown.read_line(&mut line).unwrap();
        assert_eq!(line, "hello\n", "{}", fs::read_to_string(house.path("log/auth.log")).unwrap());
        assert_eq!(house.banned(), [""; 0]);

        for guess in ["wrong", "123456", "alice"] {
            let output = ssh(guesser, guess, "true").output().unwrap();
            assert!(!output.status.success(), "{output:?}");
        }
        let ban = house.wait_banned(guesser);
        assert_eq!(ban["failures"], 3, "{ban}");
        lab.server.run(|| wait_until("the kernel holds it", SOON, || kernel_bans(guesser).then_some(())));

        let output = ssh(guesser, "right", "true").output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("timed out"), "{said}");
        // The client may have noticed already.
        let _ = typed.write_all(b"still there?\n");
        let ended = wait_until("the open session is cut", SOON, || session.0.try_wait().unwrap());
        assert!(!ended.success());
        line.clear();
        assert_eq!(shown.read_line(&mut line).unwrap(), 0, "nothing came back: {line:?}");

        let output = ssh(neighbour, "right", "echo in").output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "in\n", "{output:?}");
        house.must(&format!("unban {guesser}"));
        let output = ssh(guesser, "right", "echo in again").output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "in again\n", "{output:?}");
    });
    drop(server_program);
}
