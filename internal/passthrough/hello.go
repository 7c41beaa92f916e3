// This file reads ClientHellos.

package passthrough

import (
	"bytes"
	"crypto/tls"
	"errors"
	"net"
	"time"
)

// readHello returns the ClientHello that b begins with, of one or several records, or
// nil if it is none. crypto/tls reads it, as a server that then leaves.
func readHello(b []byte) (hello *tls.ClientHelloInfo) {
	server := tls.Server(&helloConn{bytes.NewReader(b)}, &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetConfigForClient: func(i *tls.ClientHelloInfo) (*tls.Config, error) {
			hello = i
			return nil, errEnough
		},
	})
	_ = server.Handshake()
	return hello
}

var errEnough = errors.New("the ClientHello is all that is wanted")

// helloConn is a connection that has some bytes, and takes what is written for nobody.
type helloConn struct{ *bytes.Reader }

func (*helloConn) Write(b []byte) (int, error)      { return len(b), nil }
func (*helloConn) Close() error                     { return nil }
func (*helloConn) LocalAddr() net.Addr              { return nil }
func (*helloConn) RemoteAddr() net.Addr             { return nil }
func (*helloConn) SetDeadline(time.Time) error      { return nil }
func (*helloConn) SetReadDeadline(time.Time) error  { return nil }
func (*helloConn) SetWriteDeadline(time.Time) error { return nil }

// Interface guard
var _ net.Conn = (*helloConn)(nil)
