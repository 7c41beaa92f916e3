// This file reads back what the sockets of tunnels were told.

package e2e

import (
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Both legs' sockets have what is configured, and follow the newest config.
func TestPassthroughSocketOptions(t *testing.T) {
	backend := echoBackend(t, nil)
	var p *proxy
	var addr string
	var old *net.TCPConn
	for _, test := range []struct {
		settings string
		want     toldSocket
	}{
		{"", toldSocket{on: 1, idle: 60, interval: 15, count: 4}},
		{"tcp_keepalive 61s 13s 7\ntcp_user_timeout 2500ms", toldSocket{on: 1, idle: 61, interval: 13, count: 7, timeout: 2500}},
		{"tcp_keepalive 30s", toldSocket{on: 1, idle: 30, interval: 15, count: 4}},
		{"tcp_keepalive 40s 5s\ntcp_user_timeout off", toldSocket{on: 1, idle: 40, interval: 5, count: 4}},
		{"tcp_keepalive off\ntcp_user_timeout 3s", toldSocket{timeout: 3000}},
		{"tcp_keepalive off", toldSocket{}},
	} {
		route := toAll(backend + " {\n" + test.settings + "\n}")
		if p == nil {
			p, addr = startLayer4(t, "", route)
			old = dialTCP(t, addr)
			wantEcho(t, old, "hello")
		} else {
			p.reload(t, p.layer4Config(addr, "", route))
		}
		c := dialTCP(t, addr)
		wantEcho(t, c, "hello")
		for what, local := range map[string]net.Addr{"the new tunnel": c.LocalAddr(), "the old tunnel": old.LocalAddr()} {
			wantTold(t, what+"'s client", addr, local.String(), test.want)
		}
		wantTold(t, "the backend", "", backend, test.want)
		c.Close()
		p.waitCount(t, 1)
	}
	old.Close()
}

// toldSocket is what a socket has been told of keep-alive, idle and interval in seconds,
// and of the user timeout, in milliseconds.
type toldSocket struct{ on, idle, interval, count, timeout int }

// wantTold wants that sockets of this process have been told something: all those between
// two addresses, of which the local one may be empty.
func wantTold(t testing.TB, what, local, remote string, want toldSocket) {
	t.Helper()
	var got []toldSocket
	if !eventually(10*time.Second, func() bool {
		got = told(t, local, remote)
		return len(got) > 0 && !slices.ContainsFunc(got, func(s toldSocket) bool { return s != want })
	}) {
		t.Errorf("%s: got sockets that were told %+v, want %+v", what, got, want)
	}
}

func told(t testing.TB, local, remote string) (all []toldSocket) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		fd, _ := strconv.Atoi(e.Name())
		here, err := unix.Getsockname(fd)
		there, failed := unix.Getpeername(fd)
		if err != nil || failed != nil || addrText(there) != remote || local != "" && addrText(here) != local {
			continue
		}
		var s toldSocket
		s.on, _ = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE)
		if s.on != 0 {
			s.idle, _ = unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE)
			s.interval, _ = unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL)
			s.count, _ = unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPCNT)
		}
		s.timeout, _ = unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT)
		all = append(all, s)
	}
	return all
}

// addrText is a socket's address as the net package writes it.
func addrText(a unix.Sockaddr) string {
	switch a := a.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port)).String()
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), uint16(a.Port)).String()
	default:
		return ""
	}
}
