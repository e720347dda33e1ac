//! The real agent CLI, with its API behind the proxy and its key not in the VM.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};

use e2e::{Host, LONG, Needle, World, eventually, found_below, found_in, in_own_mounts};
use serde_json::json;

const KEY: &str = "sk-e2e-The-Value-Of-The-Key-4711";

/// What openssl(1) says of the authority's key.
fn openssl(key: &Path, args: &[&str]) -> String {
    let output = Command::new("openssl")
        .args(["pkey", "-in"])
        .arg(key)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .expect("openssl is installed");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("it prints text")
}

/// The authority's key in the forms it could be kept in: a secret line of its PEM, and the numbers from which it is made.
fn authority(home: &Path) -> Vec<Needle> {
    let path = home.join("ca/ca-key.pem");
    let pem = std::fs::read_to_string(&path).expect("root may read it");
    // A PKCS #8 RSA key of 3072 bits begins with the modulus, which is public and in the certificate; after it, from the
    // tenth line of 48 bytes on, comes what is secret.
    let lines: Vec<&str> = pem.lines().collect();
    assert!((30..60).contains(&lines.len()), "{} lines", lines.len());
    let mut needles = vec![Needle::text("the authority's key (PEM)", lines[12])];
    let text = openssl(&path, &["-noout", "-text"]);
    for name in ["privateExponent", "prime1", "prime2"] {
        let digits: String = text
            .lines()
            .skip_while(|line| !line.starts_with(&format!("{name}:")))
            .skip(1)
            .take_while(|line| line.starts_with(' '))
            .flat_map(|line| line.chars().filter(char::is_ascii_hexdigit))
            .collect();
        let bytes: Vec<u8> = (0..digits.len() / 2)
            .map(|at| u8::from_str_radix(&digits[2 * at..2 * at + 2], 16).expect("hex"))
            .collect();
        assert!(bytes.len() >= 192, "{name} of {text}");
        needles.push(Needle::bytes(&format!("the authority's {name}"), &bytes));
        // As numbers lie in memory, least significant byte first.
        let reversed: Vec<u8> = bytes.into_iter().rev().collect();
        needles.push(Needle::bytes(
            &format!("the authority's {name}, reversed"),
            &reversed,
        ));
    }
    needles
}

/// Looks through an image's files; gives what is in them and whether the authority's certificate is, which must be.
fn look_into_image(image: &Path, certificate: &Needle, needles: &[Needle]) -> Vec<String> {
    let at = tempfile::tempdir().expect("a directory can be made");
    let mounted = Command::new("mount")
        .args(["-t", "erofs", "-o", "loop,ro"])
        .arg(image)
        .arg(at.path())
        .status()
        .expect("mount is installed");
    assert!(mounted.success(), "{} is not mounted", image.display());
    let found = found_below(at.path(), &[], needles);
    let bundle = at.path().join("usr/local/share/ca-certificates");
    let control = found_below(&bundle, &[], std::slice::from_ref(certificate));
    let unmounted = Command::new("umount").arg(at.path()).status();
    assert!(unmounted.is_ok_and(|status| status.success()));
    assert_eq!(control.len(), 1, "{control:?}");
    found
}

#[test]
fn the_real_cli_answers_a_prompt_with_a_key_that_is_nowhere_in_its_vm() {
    let Some(()) = in_own_mounts("full_agent") else {
        return;
    };
    let Some(mut world) = World::new() else {
        return;
    };
    world.serve_services();
    let builder = Host::new()
        .profile("vm0/default")
        .real_agent()
        .sandbox("idle_timeout_secs", 600);
    let Some(host) = builder.world(&world).start() else {
        return;
    };
    let job = host
        .submit("say hello")
        .session("s1")
        .env("ANTHROPIC_BASE_URL", "https://model.example.com")
        .allow("model.example.com")
        .secret("ANTHROPIC_API_KEY", KEY, "model.example.com")
        .spawn();
    let run = job.running();
    let messages = || {
        let mut served = world.served();
        served.retain(|one| one["at"] == "model.example.com" && one["method"] == "POST");
        served
    };
    // The model holds its answer back, so the CLI waits with all it knows.
    eventually("the CLI asks the model", 2 * LONG, || {
        !messages().is_empty()
    });
    assert_eq!(messages()[0]["headers"]["x-api-key"], KEY);

    let mut needles = authority(host.home());
    needles.push(Needle::text("the API key", KEY));
    // "The-Value-Of-The-Key" in base64, as part of anything.
    needles.push(Needle::text(
        "the encoded API key",
        "VGhlLVZhbHVlLU9mLVRoZS1LZXkt",
    ));
    let environment = host.in_vm(
        &run,
        "echo A-Marker-On-The-Disk > marker; sudo sync; sudo sh -c 'cat /proc/[0-9]*/environ' | tr '\\0' '\\n' | sort -u",
    );
    let placeholder = environment
        .lines()
        .find_map(|line| line.strip_prefix("ANTHROPIC_API_KEY="))
        .unwrap_or_else(|| panic!("no placeholder in {environment}"));
    assert_eq!(found_in(environment.as_bytes(), &needles), BTreeSet::new());
    let in_memory = [Needle::text("the placeholder", placeholder)];
    let on_disk = [Needle::text("the marker", "A-Marker-On-The-Disk")];
    let vms = host.vms();
    assert!(!vms.is_empty());
    // What the guest does have is found, so what is not found is not there.
    assert!(vms.iter().any(|vm| !vm.memory_holds(&in_memory).is_empty()));
    assert!(
        vms.iter()
            .any(|vm| !vm.open_files_hold(&on_disk).is_empty())
    );
    for vm in &vms {
        assert_eq!(vm.memory_holds(&needles), BTreeSet::new());
        assert_eq!(vm.open_files_hold(&needles), BTreeSet::new());
    }

    world.let_the_model_answer();
    let outcome = job.wait_within(2 * LONG);
    outcome.expect_exit(0);
    let log = host.log(&run);
    assert!(log.contains("An answer of the stand-in."), "{log}");
    let network = host.network_log(&run);
    network.one(&[
        ("type", json!("http")),
        ("action", json!("ALLOW")),
        ("host", json!("model.example.com")),
        ("method", json!("POST")),
        ("status", json!(200)),
    ]);
    // The VM waits for the session's next job, with all that the answer left in it.
    host.until_status("the VM is kept", |status| {
        status["idle_vms"]
            .as_array()
            .is_some_and(|kept| !kept.is_empty())
    });
    let vms = host.vms();
    assert!(!vms.is_empty());
    for vm in &vms {
        assert_eq!(vm.memory_holds(&needles), BTreeSet::new());
    }

    // Everything that the runner keeps: logs, queue, saved memory of the snapshots, and in /dev/shm what it hands over. The
    // key's own file is where it is kept.
    let keys_place = host.home().join("ca");
    let mut found = found_below(host.home(), &["ca"], &needles);
    found.extend(found_below(&host.run_dir(), &[], &needles));
    found.extend(found_below(Path::new("/dev/shm"), &[], &needles));
    assert_eq!(found, Vec::<String>::new());
    let control = found_below(&keys_place, &[], &needles);
    assert!(
        control.iter().any(|one| one.contains("key (PEM)")),
        "{control:?}"
    );
    // An image's files are compressed in it.
    let certificate = std::fs::read_to_string(keys_place.join("ca.pem")).expect("root may read it");
    let certificate = Needle::text(
        "the certificate",
        certificate.lines().nth(5).expect("lines"),
    );
    let images = host.home().join("images");
    let mut looked_at = 0;
    for image in std::fs::read_dir(images)
        .expect("a home has images")
        .flatten()
    {
        let image = image.path().join("rootfs.erofs");
        if image.exists() {
            looked_at += 1;
            let found = look_into_image(&image, &certificate, &needles);
            assert_eq!(found, Vec::<String>::new(), "{}", image.display());
        }
    }
    assert_eq!(looked_at, 1);
    host.finish();
    world.finish();
}
