// Package signetv1 is the generated form of signet.proto: what agents and the coordinator say to each other.
//
// Nothing here is verified or valid; proto/codec turns it into values of the vocabulary.
package signetv1

//go:generate go build -o ../../bin/protoc-gen-go google.golang.org/protobuf/cmd/protoc-gen-go
//go:generate go build -o ../../bin/protoc-gen-go-grpc google.golang.org/grpc/cmd/protoc-gen-go-grpc
//go:generate protoc --proto_path=. --go_out=. --go_opt=paths=source_relative --plugin=protoc-gen-go=../../bin/protoc-gen-go --go-grpc_out=. --go-grpc_opt=paths=source_relative --plugin=protoc-gen-go-grpc=../../bin/protoc-gen-go-grpc signet.proto
