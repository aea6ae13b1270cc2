// Anyone who reaches a port of NNI's service can make it run code. The service's process loads this file first. From
// then on it listens on loopback only, and answers only processes of its own user and its own pages.
"use strict";
const fs = require("node:fs");
const net = require("node:net");

// The loopback addresses and where Linux lists their connections, with the users; other systems have no such files.
const LOOPBACK = {
    "127.0.0.1": { hex: "0100007F", file: "/proc/net/tcp" },
    "::1": { hex: "00000000000000000000000001000000", file: "/proc/net/tcp6" },
};
const KNOWS_USERS = fs.existsSync(LOOPBACK["127.0.0.1"].file);
const OWN_HOST = /^(127\.0\.0\.1|localhost|\[::1\])(:\d+)?$/;
const LOOK_UPS = 3; // a list that changes while it is read may lack a line
const { emit, listen } = net.Server.prototype;

function isOwnUser(socket) {
    if (!KNOWS_USERS) return true;
    const { hex, file } = LOOPBACK[socket.remoteAddress] ?? {};
    if (!hex) return false;
    const end = (port) => `${hex}:${port.toString(16).toUpperCase().padStart(4, "0")}`;
    const ends = ` ${end(socket.remotePort)} ${end(socket.localPort)} `;
    for (let n = 0; n < LOOK_UPS; n++) {
        const line = fs.readFileSync(file, "latin1").split("\n").find((line) => line.includes(ends));
        if (line) {
            const columns = line.trim().split(/\s+/);
            const [user, inode] = [columns[7], columns[9]];
            // For a socket that its process has closed, Linux reports neither: both are 0, as if root owned it.
            return Number(user) === process.geteuid() && inode !== "0";
        }
    }
    return false;
}

// A page from elsewhere can reach loopback through the browser: under a name that it makes resolve to 127.0.0.1, or
// through a WebSocket, which any page may open.
function isOwnPage({ host, origin }) {
    return OWN_HOST.test(host) && (origin === undefined || origin === `http://${host}`);
}

net.Server.prototype.emit = function (event, subject, ...more) {
    const refused = event === "connection" ? !isOwnUser(subject)
        : (event === "request" || event === "upgrade") && !isOwnPage(subject.headers);
    if (!refused) return emit.call(this, event, subject, ...more);
    (subject.socket ?? subject).destroy();
    return true;
};

net.Server.prototype.listen = function (port, ...more) {
    if (typeof port !== "number") throw new Error(`expected the number of a port to listen on, found ${port}`);
    // NNI's tuner and trials ask for localhost, which may mean ::1: another user must not answer there.
    const other = net.createServer({ allowHalfOpen: true }, (socket) => this.emit("connection", socket));
    other.on("error", (error) => {
        if (!["EADDRNOTAVAIL", "EAFNOSUPPORT"].includes(error.code)) this.emit("error", error);
    });
    listen.call(other, port, "::1");
    this.on("close", () => other.close());
    return listen.call(this, port, "127.0.0.1", more.find((argument) => typeof argument === "function"));
};
