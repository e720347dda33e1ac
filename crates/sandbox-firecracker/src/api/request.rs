//! Every request that this engine can send.

use std::fmt;

use hyper::Method;
use serde::Serialize;

use super::types::*;

/// One request with its body.
#[derive(Clone, Debug)]
pub(crate) enum Request {
    GetVersion,
    PutMachineConfig(MachineConfig),
    PutBootSource(BootSource),
    PutDrive(Drive),
    PutNetworkInterface(NetworkInterface),
    PatchDrive(DriveUpdate),
    PatchNetworkInterface(NetworkInterfaceUpdate),
    PutVsock(Vsock),
    PutBalloon(Balloon),
    PutEntropy(Entropy),
    PutAction(Action),
    PatchVm(VmState),
    PutSnapshotCreate(SnapshotCreate),
    PutSnapshotLoad(SnapshotLoad),
    PatchBalloon(BalloonUpdate),
    GetBalloonStatistics,
}

impl Request {
    pub(crate) fn method(&self) -> Method {
        match self {
            Request::GetVersion | Request::GetBalloonStatistics => Method::GET,
            Request::PatchVm(_)
            | Request::PatchBalloon(_)
            | Request::PatchDrive(_)
            | Request::PatchNetworkInterface(_) => Method::PATCH,
            Request::PutMachineConfig(_)
            | Request::PutBootSource(_)
            | Request::PutDrive(_)
            | Request::PutNetworkInterface(_)
            | Request::PutVsock(_)
            | Request::PutBalloon(_)
            | Request::PutEntropy(_)
            | Request::PutAction(_)
            | Request::PutSnapshotCreate(_)
            | Request::PutSnapshotLoad(_) => Method::PUT,
        }
    }

    pub(crate) fn path(&self) -> String {
        match self {
            Request::GetVersion => "/version".to_owned(),
            Request::PutMachineConfig(_) => "/machine-config".to_owned(),
            Request::PutBootSource(_) => "/boot-source".to_owned(),
            Request::PutDrive(drive) => format!("/drives/{}", drive.drive_id),
            Request::PutNetworkInterface(card) => format!("/network-interfaces/{}", card.iface_id),
            Request::PatchDrive(drive) => format!("/drives/{}", drive.drive_id),
            Request::PatchNetworkInterface(card) => {
                format!("/network-interfaces/{}", card.iface_id)
            }
            Request::PutVsock(_) => "/vsock".to_owned(),
            Request::PutBalloon(_) | Request::PatchBalloon(_) => "/balloon".to_owned(),
            Request::PutEntropy(_) => "/entropy".to_owned(),
            Request::PutAction(_) => "/actions".to_owned(),
            Request::PatchVm(_) => "/vm".to_owned(),
            Request::PutSnapshotCreate(_) => "/snapshot/create".to_owned(),
            Request::PutSnapshotLoad(_) => "/snapshot/load".to_owned(),
            Request::GetBalloonStatistics => "/balloon/statistics".to_owned(),
        }
    }

    /// JSON, for requests that have a body.
    pub(crate) fn body(&self) -> Result<Option<Vec<u8>>, serde_json::Error> {
        fn json(body: &impl Serialize) -> Result<Option<Vec<u8>>, serde_json::Error> {
            serde_json::to_vec(body).map(Some)
        }
        match self {
            Request::GetVersion | Request::GetBalloonStatistics => Ok(None),
            Request::PutMachineConfig(body) => json(body),
            Request::PutBootSource(body) => json(body),
            Request::PutDrive(body) => json(body),
            Request::PutNetworkInterface(body) => json(body),
            Request::PatchDrive(body) => json(body),
            Request::PatchNetworkInterface(body) => json(body),
            Request::PutVsock(body) => json(body),
            Request::PutBalloon(body) => json(body),
            Request::PutEntropy(body) => json(body),
            Request::PutAction(body) => json(body),
            Request::PatchVm(body) => json(body),
            Request::PutSnapshotCreate(body) => json(body),
            Request::PutSnapshotLoad(body) => json(body),
            Request::PatchBalloon(body) => json(body),
        }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method(), self.path())
    }
}
