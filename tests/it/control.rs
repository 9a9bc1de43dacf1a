//! The control socket under people and programs that behave badly, and a second daemon that wants the same place.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::daemon::SSHD;
use crate::house::{House, SOON, kernel_bans};
use crate::netns::private;

fn connect(house: &House) -> UnixStream {
    let stream = UnixStream::connect(house.path("socket")).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream
}

/// Says a line and reads one back.
#[track_caller]
fn ask(stream: &mut UnixStream, line: &[u8]) -> Value {
    stream.write_all(line).unwrap();
    stream.write_all(b"\n").unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    serde_json::from_str(&answer).unwrap_or_else(|why| panic!("{why}: {answer:?}"))
}

#[test]
fn garbage_is_answered_with_a_sentence_and_the_connection_goes_on() {
    private(|| {
        let house = House::new(SSHD);
        let mut stream = connect(&house);
        let all_bytes: Vec<u8> = (0..=255u8).filter(|byte| *byte != b'\n').collect();
        let deep = [vec![b'['; 100_000], vec![b']'; 100_000]].concat();
        let wrong: [&[u8]; 8] = [
            b"",
            b"{}",
            b"null",
            &all_bytes,
            &deep,
            br#"{"command":"explode"}"#,
            br#"{"command":"ban","nets":"all"}"#,
            br#"{"command":"why","net":"192.0.2.1","x":1}"#,
        ];
        for line in wrong {
            let answer = ask(&mut stream, line);
            assert_eq!([&answer["ok"], &answer["code"]], [&json!(false), &json!(2)], "{answer}");
            assert!(answer["message"].as_str().unwrap().starts_with("not a request: "), "{answer}");
        }
        assert_eq!(ask(&mut stream, br#"{"command":"status"}"#)["ok"], true);
    });
}

#[test]
fn a_request_without_end_is_refused() {
    private(|| {
        let house = House::new(SSHD);
        let mut stream = connect(&house);
        let mut sent = 0;
        // It may be cut off while it is still talking.
        while sent < 1 << 20 && stream.write_all(&[b'x'; 4096]).is_ok() {
            sent += 4096;
        }
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let answer: Value = serde_json::from_slice(&answer).unwrap();
        assert_eq!(answer["ok"], false);
        assert!(answer["message"].as_str().unwrap().contains("longer than 262144 bytes"), "{answer}");
        house.must("status");
    });
}

#[test]
fn silent_and_broken_connections_keep_nobody_from_being_served() {
    private(|| {
        let house = House::new(SSHD);
        let silent: Vec<UnixStream> = (0..300).map(|_| connect(&house)).collect();
        let asked = Instant::now();
        house.must("ban 198.51.100.7");
        assert!(asked.elapsed() < SOON, "it had to wait for the silent ones to be sent away");
        assert!(kernel_bans("198.51.100.7"));
        for (number, mut stream) in silent.into_iter().enumerate() {
            // Half a request, and gone; or a whole one whose answer nobody reads.
            let line: &[u8] = if number % 2 == 0 { br#"{"comm"# } else { b"{\"command\":\"list\"}\n" };
            let _ = stream.write_all(line);
        }
        house.must("list");
    });
}

#[test]
fn a_hundred_ask_at_once() {
    private(|| {
        let house = House::new(SSHD);
        std::thread::scope(|scope| {
            for n in 0..100 {
                let house = &house;
                scope.spawn(move || {
                    let request = format!(r#"{{"command":"ban","nets":["198.51.100.{n}"]}}"#);
                    assert_eq!(ask(&mut connect(house), request.as_bytes())["ok"], true);
                });
            }
        });
        assert_eq!(house.list("").len(), 100);
        assert!((0..100).all(|n| kernel_bans(&format!("198.51.100.{n}"))));
    });
}

#[test]
fn the_socket_is_for_its_group_alone() {
    private(|| {
        let house = House::new(SSHD);
        let mode = std::fs::metadata(house.path("socket")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o660);
    });
}

#[test]
fn a_second_daemon_gives_way_to_the_first() {
    private(|| {
        let house = House::new(SSHD);
        house.must("ban 198.51.100.7");
        let said = house.start_in_vain(house.command());
        assert_eq!((said.code, said.err.lines().count()), (1, 1), "{said:?}");
        assert!(said.err.contains("another band is already listening on "), "{said:?}");
        // A socket of its own, but the same state.
        let configuration = std::fs::read_to_string(house.path("band.toml")).unwrap();
        std::fs::write(house.path("band.toml"), configuration.replace("/socket\"", "/socket2\"")).unwrap();
        let said = house.start_in_vain(house.command());
        assert_eq!((said.code, said.err.lines().count()), (1, 1), "{said:?}");
        assert!(said.err.contains("state is in use by another band"), "{said:?}");
        assert!(!house.path("socket2").exists());
        assert_eq!(house.banned(), ["198.51.100.7"]);
        assert!(kernel_bans("198.51.100.7"));
    });
}

#[test]
fn a_socket_that_a_dead_daemon_left_is_replaced_and_a_file_is_not() {
    private(|| {
        let mut house = House::new(SSHD);
        house.end(Signal::KILL);
        assert!(house.path("socket").exists());
        house.start();
        house.must("status");
        house.end(Signal::TERM);
        std::fs::write(house.path("socket"), "precious").unwrap();
        let said = house.start_in_vain(house.command());
        assert_eq!((said.code, said.err.lines().count()), (1, 1), "{said:?}");
        assert!(said.err.contains("is in the way and no socket"), "{said:?}");
        assert_eq!(std::fs::read_to_string(house.path("socket")).unwrap(), "precious");
    });
}
