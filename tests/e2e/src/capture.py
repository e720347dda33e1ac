"""Prints a line of JSON for each IPv4 packet of TCP or UDP that this network namespace sees, after the line `ready`.

Forwarded packets are seen at each device that they pass.
"""

import json
import socket
import struct

ALL = 3
sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ALL))
print("ready", flush=True)
while True:
    packet, (_device, kind, *_) = sniffer.recvfrom(65535)
    if kind != 0x0800 or packet[9] not in (6, 17):
        continue
    header = (packet[0] & 15) * 4
    source, target = (socket.inet_ntoa(packet[at : at + 4]) for at in (12, 16))
    length = struct.unpack("!H", packet[2:4])[0]
    segment = packet[header:length] if length else packet[header:]
    port = struct.unpack("!H", segment[2:4])[0]
    tcp = packet[9] == 6
    data = segment[(segment[12] >> 4) * 4 :] if tcp else segment[8:]
    opens = segment[13] & 18 == 2 if tcp else True
    fields = {"from": source, "to": target, "port": port, "tcp": tcp, "opens": opens, "data": data.decode("latin-1")}
    print(json.dumps(fields), flush=True)
