package sock

import (
	"crypto/tls"
	"reflect"
	"unsafe"
)

// tlsConfigOffset is where a tls.Conn keeps the config of its handshake, or
// none if this Go version keeps it elsewhere or as another type.
var tlsConfigOffset, tlsConfigKnown = func() (uintptr, bool) {
	f, ok := reflect.TypeFor[tls.Conn]().FieldByName("config")
	return f.Offset, ok && f.Type == reflect.TypeFor[*tls.Config]()
}()

// CanForgetTLSConfig reports whether ForgetTLSConfig does anything with this
// version of Go.
func CanForgetTLSConfig() bool { return tlsConfigKnown }

// ForgetTLSConfig cuts the link from a TLS connection, whose handshake is
// complete, to the config of that handshake. Through its callbacks a config of
// Caddy's reaches the whole configuration that made the connection, which a
// connection that outlives a reload would keep in memory; nothing public
// detaches it (read in crypto/tls of Go 1.26: after the handshake a connection
// takes only its random source, record sizing, the cache for session tickets and
// renegotiation from the config, all of which have working zero values: tickets
// are dropped, renegotiation is refused).
//
// Nobody may use conn during the call. Without tlsConfigKnown it does nothing.
func ForgetTLSConfig(conn *tls.Conn) {
	if !tlsConfigKnown || !conn.ConnectionState().HandshakeComplete {
		return
	}
	field := (**tls.Config)(unsafe.Add(unsafe.Pointer(conn), tlsConfigOffset))
	*field = emptyTLSConfig
}

// emptyTLSConfig is shared by all connections; crypto/tls locks what it changes.
var emptyTLSConfig = new(tls.Config)
